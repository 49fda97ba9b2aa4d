"""The fused losses and steps inside the trainers people already run, one module per trainer.

==================  ==============================================================  =========================
module              what it gives                                                   needs the trainer
==================  ==============================================================  =========================
``flow_grpo``       ``record()``, ``sde_step_with_logprob``, losses on ``sample``   no
``dance_grpo``      ``record()``, ``flux_step`` with the mean, losses               no
``mix_grpo``        ``record()``, both steps, loss with ``kl_coeff``                no
``verl_omni``       ``register()``: losses and scheduler step                       yes
``unirl``           ``FlowDPPO`` and SDE strategies for Hydra ``_target_``          yes
``flow_factory``    ``DPPOTrainer`` for the trainer registry, and a command         yes
==================  ==============================================================  =========================

None of the trainers is a dependency. A module that needs its trainer says so when it is imported without it. Guides:
``docs/integrations``.
"""
