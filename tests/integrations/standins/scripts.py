"""Scripts with the call sites of flow_grpo, DanceGRPO, MixGRPO and miles_diffusion: names and shapes, no more."""

from __future__ import annotations

IMPORTS = {
    "flow_grpo": "from flow_grpo.diffusers_patch.pipeline import pipeline_with_logprob",
    "wan": "from flow_grpo.diffusers_patch.pipeline import wan_pipeline_with_logprob, sde_step_with_logprob",
}


def flow_grpo(file: str) -> str:
    """A script of flow_grpo: evaluation, a sampling loop, and the loop over timesteps with its inline loss."""
    wan, qwen, guard = "wan" in file, "qwen" in file, "Guard" in file
    pipeline = "wan_pipeline_with_logprob" if wan else "pipeline_with_logprob"
    taken = "collected_data" if qwen else "images, latents, log_probs"
    unpack = ""
    if qwen:
        unpack = """
        images = collected_data["images"]
        latents, log_probs = (collected_data[key] for key in ("all_latents", "all_log_probs"))"""
    back = {"wan": ", dt", "guard": ", sqrt_dt"}.get("wan" if wan else "guard" if guard else "", "")
    reference = "_, _, prev_sample_mean_ref, _" + (", _" if back else "")
    backward = "loss.backward()" if qwen else "accelerator.backward(loss)"
    means = '\n            "prev_sample_mean": torch.stack(prev_sample_mean, dim=1),' if guard else ""
    return f"""
import torch
{IMPORTS["wan" if wan else "flow_grpo"]}

def eval(pipeline, prompts):
    with autocast():
        with torch.no_grad():
            {taken} = {pipeline}(
                pipeline, prompts, noise_level=0,
            )

def main():
    for i in range(batches):
        with autocast():
            with torch.no_grad():
                {taken + (", prev_sample_mean" if guard else "")} = {pipeline}(
                    pipeline,
                    prompts,
                    noise_level=config.sample.noise_level,
                ){unpack}
        latents = torch.stack(latents, dim=1)
        log_probs = torch.stack(log_probs, dim=1)
        timesteps = pipeline.scheduler.timesteps.repeat(config.sample.train_batch_size, 1)
        samples.append(
        {{
            "timesteps": timesteps,
            "latents": latents[:, :-1],
            "next_latents": latents[:, 1:],
            "log_probs": log_probs,{means}
        }}
        )
    for key in ["timesteps", "latents", "next_latents", "log_probs"]:
        samples[0][key] = samples[0][key]
    for i, sample in batches_of(samples):
        for j in train_timesteps:
            with autocast():
                prev_sample, log_prob, prev_sample_mean, std_dev_t{back} = compute_log_prob(pipeline, sample, j)
                if config.train.beta > 0:
                    with torch.no_grad():
                        {reference} = compute_log_prob(pipeline, sample, j, reference=True)

            # grpo logic
            ratio = torch.exp(log_prob - sample["log_probs"][:, j])
            print("ratio", ratio)
            loss = -(sample["advantages"][:, j] * ratio).mean()
            info["loss"].append(loss)

            # backward pass
            {backward}
            optimizer.step()
            optimizer.zero_grad()
"""


def fastvideo(file: str, *, mix: bool = False) -> str:
    """A script of DanceGRPO or MixGRPO: both calls of the step, and ``train_one_step``."""
    hunyuan = "hunyuan" in file
    step = (
        "flow_grpo_step(pred, z.float(), args.eta, sigma_schedule, i, {state})"
        if mix
        else "flux_step(pred, z.float(), args.eta, sigmas=sigma_schedule, index=i, prev_sample={state}, grpo=True, "
        "sde_solver=True)"
    )
    names = "z, original, log_prob, mean, std" if mix else "z, original, log_prob"
    rewards = "vq_rewards, mq_rewards" if hunyuan else "rewards"
    kinds = ("vq_", "mq_") if hunyuan else ("",)
    stored = "\n".join(f'        "{kind}advantages": normalised({kind}rewards),' for kind in kinds)
    losses = ""
    for kind in kinds:
        loss = "policy_loss" if mix else f"{kind}loss"
        count = "len(train_timesteps)" if mix else "train_timesteps"
        frac = "\n            clip_frac = torch.mean((torch.abs(ratio - 1.0) > clip_range).float())" if mix else ""
        losses += f"""
            {kind}advantages = torch.clamp(
                sample["{kind}advantages"], -adv_clip_max, adv_clip_max
            )
            ratio = torch.exp(new_log_probs - sample["log_probs"][:,_])
            {kind}unclipped_loss = -{kind}advantages * ratio{frac}
            {loss} = torch.mean({kind}unclipped_loss) / (args.gradient_accumulation_steps * {count})"""
    total = "loss = policy_loss" if mix else "loss = vq_loss + mq_loss" if hunyuan else "loss = 1.0 * loss"
    steps = "range(train_timesteps)" if not mix else "train_timesteps"
    made = "train_timesteps = range(3)" if mix else "train_timesteps = 3"
    imports = (
        "from fastvideo.utils.sampling_utils import flow_grpo_step, dance_grpo_step, run_sample_step, dpm_step"
        if mix
        else "from fastvideo.utils.logging_ import main_print"
    )
    return f"""
import torch
{imports}

def run_steps(args, z, sigma_schedule, transformer):
    latents, log_probs = [z], []
    for i in range(args.sampling_steps):
        pred = transformer(z)
        {names} = {step.format(state="None")}
        latents.append(z)
        log_probs.append(log_prob)
    return torch.stack(latents, 1), torch.stack(log_probs, 1)

def grpo_one_step(
    args, z, pre_latents, transformer, i, sigma_schedule,
):
    pred = transformer(z)
    {names} = {step.format(state="pre_latents")}
    return log_prob

def sample_reference_model(
    args, transformer, sigma_schedule,
):
    with torch.no_grad():
        runs = [run_steps(args, args.start[k:k + 1], sigma_schedule, transformer) for k in range(len(args.start))]
    return tuple(torch.cat(x) for x in zip(*runs))

def train_one_step(args, transformer, sigma_schedule, {rewards}, advantages_of, optimizer, normalised):
    all_latents, all_log_probs = sample_reference_model(args, transformer, sigma_schedule)
    samples = {{
        "timesteps": torch.arange(args.sampling_steps - 1).repeat(len(all_latents), 1),
        "latents": all_latents[:, :-1][:, :-1],
        "next_latents": all_latents[:, 1:][:, :-1],
        "log_probs": all_log_probs[:, :-1],
{stored}
    }}
    perms = torch.stack([torch.randperm(args.sampling_steps - 1) for _ in range(len(all_latents))])
    for key in ["timesteps", "latents", "next_latents", "log_probs"]:
        samples[key] = samples[key][torch.arange(len(all_latents))[:, None], perms]
    samples = {{key: value.unsqueeze(1) for key, value in samples.items()}}
    {made}
    clip_range, adv_clip_max = 1e-4, 5.0
    for i, sample in enumerate([dict(zip(samples, x)) for x in zip(*samples.values())]):
        for _ in {steps}:
            new_log_probs = grpo_one_step(
                args, sample["latents"][:,_], sample["next_latents"][:,_], transformer, perms[i][_], sigma_schedule,
            )
{losses}
            {total}
            loss.backward()
            advantages_of(globals(), locals())
        optimizer.step()
        optimizer.zero_grad()
"""


def miles() -> str:
    """The actor of miles_diffusion: the loss of one tile."""
    return """
import torch
from miles.utils.sde_log_prob import sde_step_with_logprob

def tile_loss(self, noise_pred_flat, grids):
    _, log_prob_new_flat, _, _ = sde_step_with_logprob(
        self.scheduler, noise_pred_flat.float(), timesteps_flat, latents_flat.float(),
        prev_sample=next_latents_tile.flatten(0, 1), noise_level=noise_level,
    )
    ratio = torch.exp(log_prob_new_flat.reshape(advantage_tile.shape) - log_prob_old_tile)
    per_cell_loss = -advantage_tile * ratio
    loss = per_cell_loss.mean()
    return loss
"""
