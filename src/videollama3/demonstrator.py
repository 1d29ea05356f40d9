"""Where the demonstrator is: a small trained checkpoint inside the package, which answers when no other is named.

Nothing enters, a folder leaves; how it was made stands in `demonstrator/` of the repository and in
docs/demonstrator.md.
"""

from __future__ import annotations

from pathlib import Path

NOTICE = (
    "No --model was given: the demonstrator answers, 6.7 million parameters that know coloured shapes on dark "
    "backgrounds and nothing else. Pass --model FOLDER_OR_REPO, for instance --model DAMO-NLP-SG/VideoLLaMA3-2B."
)


def demonstrator_path() -> Path:
    """The folder of the demonstrator's checkpoint, for `from_pretrained`.

    Raises:
        FileNotFoundError: when the package was built without it.
    """
    folder = Path(__file__).parent / "demonstrator_checkpoint"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"Expected the demonstrator's checkpoint in {folder}, got none: install a released package, or train it "
            "with `make demonstrator`."
        )
    return folder
