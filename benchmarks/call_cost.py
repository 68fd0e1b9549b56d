"""What one call of turnout.expert_parallel costs before rows travel: the comparison of what all ranks must have alike.

    torchrun --nproc-per-node 2 benchmarks/call_cost.py

Prints medians over interleaved calls: the comparison's message (an all-gather of two numbers) alone, and the whole call
with 4 and with 256 tokens a rank (hidden 768, two experts of width 2048, top-1), forward only.
"""

import datetime
import statistics
import time

import torch
import torch.distributed as dist

import turnout

HIDDEN, FFN, CALLS = 768, 2048, 200


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    ranks, group = dist.get_world_size(), dist.group.WORLD.group_name
    functional = torch.ops._c10d_functional
    up, down = torch.randn(1, 2 * FFN, HIDDEN), torch.randn(1, HIDDEN, FFN)
    numbers = torch.tensor([2, 1])

    def layer(tokens: int):
        x, weights = torch.randn(tokens, HIDDEN), torch.ones(tokens, 1)
        ids = (torch.arange(tokens) % ranks).unsqueeze(1)
        return lambda: turnout.expert_parallel(x, ids, weights, up, down, num_experts=ranks)

    calls = {
        "comparison": lambda: functional.wait_tensor(functional.all_gather_into_tensor(numbers, ranks, group)),
        "call, 4 tokens": layer(4),
        "call, 256 tokens": layer(256),
    }
    times = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(CALLS):
            for name, call in calls.items():
                calls["comparison"]()  # begin together
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    if dist.get_rank() == 0:
        for name, seconds in times.items():
            low, middle, high = (1e3 * s for s in statistics.quantiles(seconds, n=4))
            print(f"{name}: {middle:.3f} ms (quartiles {low:.3f} to {high:.3f})")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
