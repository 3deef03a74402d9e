"""Whether two language models have the same weights."""

import hashlib

from cllm4rec.model.backbone import Backbone


def digest_of_weights(backbone: Backbone) -> str:
    """sha256 of the names, shapes and float32 bytes of all weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
