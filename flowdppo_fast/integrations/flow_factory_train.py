"""Flow-Factory's ``train.py`` with the fused ``dppo`` trainer: what each process of a run executes.

``python -m flowdppo_fast.integrations.flow_factory recipe.yaml`` starts it with the launcher, processes and precision
of the recipe. A launcher of your own runs ``-m flowdppo_fast.integrations.flow_factory_train recipe.yaml``.
"""

from ._trainer import module_of
from .flow_factory import register

if __name__ == "__main__":
    register()
    module_of("flow_factory.train", "Flow-Factory", "https://github.com/X-GenGroup/Flow-Factory").main()
