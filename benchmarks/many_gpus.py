"""Do DDP, FSDP2 and DeepSpeed train alike, and what do a step and its memory take?

``python benchmarks/many_gpus.py --model FOLDER --data train.jsonl --output many_gpus.json``

Each launcher of ``configs/accelerate`` trains the same steps with one process, and with two where there are two GPUs; DeepSpeed
where it is installed. In float32 the losses have to be those of DDP with one process, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"
TOLERANCE = 1e-3  # of the loss: kernels of a GPU add up in another order


def train(launcher: str, processes: int, args: argparse.Namespace, folder: Path, bf16: bool) -> dict[str, Any]:
    """Losses, peak memory of the first process in bytes, and seconds a step, of one run."""
    run = folder / f"{launcher}-{processes}-{bf16}"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{launcher}.yaml")]
    launch += ["--num_processes", str(processes)] + (["--cpu"] if args.cpu else [])
    options: dict[str, Any] = {
        "model_name_or_path": args.model,
        "train_data": args.data,
        "output_dir": run,
        "bf16": bf16,
    }
    options |= {"per_device_train_batch_size": args.batch // processes, "train_group_size": 5, "max_steps": args.steps}
    options |= {
        "query_max_len": 64,
        "passage_max_len": args.passage_max_len,
        "negatives_cross_device": True,
        "logging_steps": 1,
    }
    options |= {
        "num_experts": 0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": args.cpu,
        "optim": "adamw_torch",
    }
    options |= {"distinct_batches": False, "merge_experts": False, "learning_rate": 1e-5, "disable_tqdm": True}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([*launch, "-m", "clpl_moe.train", *words], capture_output=True, text=True)
    if done.returncode:
        return {"launcher": launcher, "processes": processes, "bf16": bf16, "failed": done.stderr[-2000:]}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in records if "train_runtime" in record)
    return {
        "launcher": launcher,
        "processes": processes,
        "bf16": bf16,
        "losses": [record["loss"] for record in records if "loss" in record],
        "seconds_a_step": last["train_runtime"] / args.steps,
        "peak_memory": last.get("train_peak_memory"),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="training file")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--batch", type=int, default=8, help="queries a step, of all processes")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--passage_max_len", type=int, default=256)
    parser.add_argument("--launchers", nargs="+", default=["ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("--cpu", action="store_true", help="to try this script: accelerate divides no model on a CPU")
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    unlike = 0
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2) if torch.cuda.device_count() > 1 else (1,):
            for launcher in args.launchers:
                if launcher.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
                    print(f"{launcher}: deepspeed is not installed")
                    continue
                for bf16 in (False, True) if processes == 1 and not args.cpu else (False,):
                    result = train(launcher, processes, args, Path(folder), bf16)
                    expected = found[0].get("losses") if found else None
                    pairs = zip(result.get("losses", []), expected or [])
                    if "failed" in result or (not bf16 and any(abs(a - b) > TOLERANCE * b for a, b in pairs)):
                        unlike += 1
                    found.append(result)
                    print(json.dumps(result), flush=True)
                    # Each as soon as it is there: the machine may go.
                    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    if unlike:
        sys.exit(f"{unlike} runs failed, or have other losses than the first one")


if __name__ == "__main__":
    main()
