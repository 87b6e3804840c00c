"""What AWS Neuron cannot run, found in a JAX program before it reaches the compiler.

`check` lowers a function as for a Neuron device, which need not be there, and walks the StableHLO;
`check_module` walks what is lowered already. `RULES` says what is looked for, and by whose word.
"""

from jax_tkg.neuron.checker import check, check_module
from jax_tkg.neuron.rules import RULES, Finding, Rule

__all__ = ["RULES", "Finding", "Rule", "check", "check_module"]
