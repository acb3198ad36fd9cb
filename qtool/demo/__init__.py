"""What `qtool demo` needs: a synthetic labelled set, its generator, and a small sentiment adapter for a MiniLM."""
