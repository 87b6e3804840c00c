"""The pure-JAX online softmax: plan, two loop forms, backward."""
