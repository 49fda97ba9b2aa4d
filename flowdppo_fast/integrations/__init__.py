"""The fused losses and steps inside the trainers people already run, one module per trainer.

==================  ==============================================================  =========================
module              what it gives                                                   needs the trainer
==================  ==============================================================  =========================
``flow_grpo``       ``sde_step_with_logprob``, losses on the scripts' ``sample``    no
``dance_grpo``      ``flux_step`` with the mean, losses                             no
``mix_grpo``        ``flow_grpo_step``, ``dance_grpo_step``, loss with ``kl_coeff``  no
``verl_omni``       ``register()``: losses and scheduler step                       yes
``unirl``           ``FlowDPPO`` and SDE strategies for Hydra ``_target_``          yes
``flow_factory``    ``DPPOTrainer`` for the trainer registry                        yes
==================  ==============================================================  =========================

None of the trainers is a dependency. A module that needs its trainer says so when it is imported without it. Guides:
``docs/integrations``.
"""
