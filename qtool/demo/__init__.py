"""What `qtool demo` needs: a synthetic labelled set with its generator, and a small sentiment adapter for a MiniLM encoder."""
