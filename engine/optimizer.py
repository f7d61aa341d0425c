"""The optimizer of all stages: AdamW, and Muon for the matrices of the blocks."""
import torch
from torch import Tensor

from engine.parallel import all_reduce, world_size
from model import GPT


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024): the update of a matrix is the orthogonal matrix nearest to its momentum, so that the
    weights move equally far in all directions. In pretraining on arithmetic, it needs several times fewer tokens.

    The updates are those of torch.optim.Muon. All matrices of one shape are computed as one batch, which is 2.3 times
    as fast. dtype is the compute dtype.
    """

    def __init__(self, matrices: list[Tensor], lr: float, dtype: torch.dtype, momentum: float = 0.95):
        self.dtype = dtype
        shapes = {p.shape: [m for m in matrices if m.shape == p.shape] for p in matrices}
        super().__init__([{"params": params} for params in shapes.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, (rows, columns) = group["params"], group["params"][0].shape
            grad = torch.stack([p.grad for p in params])  # (n, rows, columns)
            buffer = self.state[params[0]].setdefault("momentum_buffer", torch.zeros_like(grad))
            update = self.direction(grad, buffer)
            torch._foreach_add_(params, update.unbind(), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def direction(self, grad: Tensor, buffer: Tensor) -> Tensor:
        """Update the momentum buffer, form the Nesterov gradient U S V^T, and return approximately U V^T, by five
        Newton-Schulz steps. grad, buffer and result are (n, rows, columns), float32, for n matrices."""
        momentum = self.defaults["momentum"]
        buffer.lerp_(grad, 1 - momentum)
        x = grad.lerp(buffer, momentum)
        tall = x.size(1) > x.size(2)
        x = x.mT if tall else x  # so that x x^T is the smaller of its two products
        x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(self.dtype)
        for _ in range(5):  # each singular value s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which takes it near to 1
            a = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return (x.mT if tall else x).float()


class Optimizer:
    """AdamW, with Muon for the matrices of the blocks if muon_lr is above 0.

    Pretraining and distillation use Muon. RL uses AdamW alone, with the usual beta2 of 0.999. AdamW takes smaller steps
    where the gradient is noisy, as in RL. All steps of Muon have the same size.
    """

    def __init__(self, model: GPT, adam_lr: float, muon_lr: float = 0.0, beta2: float = 0.95):
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if muon_lr else []
        others = [p for p in model.parameters() if all(p is not m for m in matrices)]
        self.parts = [torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, beta2), weight_decay=0.0, fused=True)]
        if matrices:
            self.parts.append(Muon(matrices, muon_lr, model.dtype))
        self.lrs = [part.param_groups[0]["lr"] for part in self.parts]
        self.parameters = others + matrices

    def step(self, lr_scale: float = 1.0, share: float = 1.0, has_gradient: bool = True, clip: float = 1.0) -> Tensor:
        """One update with the learning rates times lr_scale -> the norm of the gradient before it is clipped to `clip`.

        With several ranks, each rank's gradient is that of the mean loss over its own shard of a minibatch, and `share`
        is the number of rows or tokens in this shard. The gradient of the whole minibatch is the mean of the ranks'
        gradients, weighted by `share`. Every rank calls this for every minibatch, also without a gradient of its own.
        If no rank has a gradient, nothing changes. (An optimizer step would move the weights by momentum alone.) p.grad
        does not say whether there is one: CUDA graphs set it to zeros when a forward pass begins (GraphedTraining).
        """
        if world_size() > 1:
            has_gradient = self.mean_over_ranks(share, has_gradient)
        if not has_gradient:
            return torch.zeros((), device=self.parameters[0].device)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for part, lr in zip(self.parts, self.lrs):
            for group in part.param_groups:
                group["lr"] = lr * lr_scale
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def mean_over_ranks(self, share: float, has_gradient: bool) -> bool:
        """Replace each rank's gradients by their weighted mean over all ranks -> whether any rank has gradients."""
        total, n_with = all_reduce(torch.tensor([float(share), float(has_gradient)])).tolist()
        if not n_with:
            return False
        mine = [torch.zeros_like(p) if p.grad is None else p.grad * (share / total) for p in self.parameters]
        mean = all_reduce(torch.cat([grad.flatten() for grad in mine]))
        for p, grad in zip(self.parameters, mean.split([p.numel() for p in self.parameters])):
            p.grad = grad.view_as(p)
        return True

    def state_dict(self) -> list[dict]:
        """The state that a checkpoint stores."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        """Restore the state of a checkpoint."""
        for part, part_state in zip(self.parts, state):
            part.load_state_dict(part_state)
