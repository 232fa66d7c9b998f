"""Everything that touches transformers: loading by role, paged attention, the runners of the stages, sampling."""
