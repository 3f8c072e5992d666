"""From adapters to what is deployed: the base as files, merged models, and what serving an adapter as it is costs."""
