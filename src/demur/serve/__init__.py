"""The dial as a gateway: an OpenAI-compatible server over a local model or before an engine that already runs."""
