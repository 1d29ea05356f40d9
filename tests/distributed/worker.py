"""One process of several training runs; started by `torch.distributed.run` from the tests of this folder.

Reads a JSON of runs, trains the tiny model on synthetic samples in each, and process 0 writes what happened.
"""

import json
import os
import sys

import torch

from tests.training.synthetic import Samples, arguments, losses, tiny_model
from videollama3.training.trainer import ModuleRates, RowLimits, VideoLlama3Trainer


def shard_on_cpu():
    """Lets accelerate take its own FSDP2 path on the CPU, which it else reserves for devices.

    Without this its settings for FSDP are silently left aside on the CPU, and the run is plain DDP.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ.update(
        {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "VideoLlama3VisionEncoderLayer,Qwen2DecoderLayer",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }
    )
    state = PartialState(cpu=True)
    assert state.backend == "gloo"
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run(settings):
    """Trains once and returns what happened; with several processes, the same on each."""
    training_arguments = arguments(settings["folder"], **settings.get("arguments", {}))
    if settings.get("fsdp"):
        # After the arguments, which set up the processes anew.
        shard_on_cpu()
    model, processor = tiny_model()
    if settings.get("head_of_its_own"):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    patches = []
    model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    held_out = settings.get("eval_kinds")
    trainer = VideoLlama3Trainer(
        model,
        training_arguments,
        processor=processor,
        train_dataset=Samples(processor, settings["kinds"]),
        eval_dataset=Samples(processor, held_out, seed=9) if held_out else None,
        rates=ModuleRates(**settings["rates"]),
        limits=RowLimits(max_length=settings["max_length"]),
    )
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    # Not the model's: those of its outermost part stay whole after a forward pass.
    trained = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    result = {
        "losses": losses(trainer),
        "world_size": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": sum(type(parameter).__name__ == "DTensor" for parameter in trained) / len(trained),
        "patches": _from_all(list(patches)),
        "eval_loss": trainer.evaluate()["eval_loss"] if held_out else None,
    }
    if settings.get("final"):
        trainer.save_whole_model(settings["final"])
    return result


def _from_all(value):
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def main(path):
    with open(path) as file:
        settings = json.load(file)
    torch.set_num_threads(1)
    results = {name: run(one) for name, one in settings["runs"].items()}
    if torch.distributed.get_rank() == 0:
        with open(settings["result"], "w") as file:
            json.dump(results, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # Not the interpreter's own end: gloo's threads were once seen to abort a process that had finished its runs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
