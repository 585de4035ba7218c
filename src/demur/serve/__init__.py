"""The dial as a gateway: an OpenAI-compatible server in front of a local model or of an engine that already runs."""
