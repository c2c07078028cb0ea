"""Exact savings of training memory for transformers models, and the meter that shows them.

Knows torch and transformers, never TRL. Import from the modules: `lowmem.logprobs`, `lowmem.live_bytes`,
`lowmem.shared_prefix`.
"""
