"""Methods that change weights. Each `fit` returns an `Adapter`; `adapter.on(runtime)` yields a Runtime."""
