"""The HTTP side: OpenAI-compatible routes, media, and the frontend that owns the truth about every request."""
