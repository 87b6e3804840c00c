"""NKI kernels and what runs them where there is no Neuron device."""
