"""CLIP's released weights: one pinned file, checked before it is read, under open_clip's names.

OpenAI's ViT-L/14 is taken from the file that the authors' package uses too, `openai/clip-vit-large-patch14` on
the Hugging Face hub (safetensors, so without code in it), at a fixed revision and SHA-256.
"""

import hashlib
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

TOWER = "ViT-L-14-quickgelu"  # open_clip's name; without QuickGELU the same weights give other features
REPOSITORY = "openai/clip-vit-large-patch14"
REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
FILE = "model.safetensors"
SHA256 = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"

# Hugging Face's names → open_clip's, for what needs no more than a name.
PARTS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # so spelled there
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def released_file() -> Path:
    """OpenAI's CLIP ViT-L/14 (1.7 GB) in the hub's cache, downloaded with progress at the first call, checked.

    Raises FileNotFoundError, saying what still works, where it is neither kept nor reachable, and ValueError
    where its SHA-256 is not the pinned one.
    """
    import huggingface_hub as hub

    options = {"repo_id": REPOSITORY, "filename": FILE, "revision": REVISION}
    try:
        path = Path(hub.hf_hub_download(**options, local_files_only=True))
    except OSError:
        try:
            # asked once, for the download itself would try for half a minute on a machine without a network
            hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
            path = Path(hub.hf_hub_download(**options))
        except Exception as error:  # each HTTP library raises its own
            raise FileNotFoundError(
                f"CLIP ViT-L/14 ({REPOSITORY}, {FILE}, 1.7 GB) is not kept in {hub.constants.HF_HUB_CACHE} and "
                f"could not be downloaded ({(str(error) or type(error).__name__).splitlines()[0]}). With a network "
                f"it is fetched at first use; without one, copy the file over and give its path as clip_weights. "
                f"Without it the location encoder, the gallery, probes, maps and models with the small tower "
                f"still work"
            ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} is not the released CLIP: its SHA-256 is {found}, expected {SHA256}; delete it and run again"
        )
    return path


def at_hand() -> bool:
    """Whether released_file() needs no network: the file is in the hub's cache."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # its progress bar asks a notebook for widgets, which nothing here needs
        from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(REPOSITORY, FILE, revision=REVISION), str)


def read(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a local CLIP file under open_clip's names; nothing in the file is executed.

    Takes .safetensors, or PyTorch files of plain tensors, in Hugging Face's or open_clip's naming.
    Raises FileNotFoundError, and ValueError for anything else, such as OpenAI's TorchScript archive.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no CLIP weights at {path}; give a .safetensors or .pt file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle and zip readers each raise their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as tensors without executing it ({reason}); give a .safetensors file, such as "
            f"{FILE} of {REPOSITORY}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no table of tensors; give a .safetensors file of CLIP")
    return from_hugging_face(state) if "visual_projection.weight" in state else state


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face CLIPModel's tensors under open_clip's names; q, k and v become one matrix."""
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(
            ("position_ids", ".k_proj.weight", ".k_proj.bias", ".v_proj.weight", ".v_proj.bias")
        ):
            continue  # counters, and what goes with the q of its layer
        if name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.T.contiguous()
            continue
        ours = name
        for theirs, part in PARTS.items():
            ours = ours.replace(theirs, part)
        if match := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", ours):
            ours = f"{match[1]}.attn.in_proj_{match[2]}"
            tensor = torch.cat(
                [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            )
        renamed[ours] = tensor
    return renamed
