"""`uvicorn tests.page.faulty_app:app`: the server on a machine whose GPU can't compile the kernels."""

from server.app import create_app, turbocache  # isort: skip  # before MLX

import mlx.core as mx

from tests.faulty import compile_error, faulty, with_lanes
from turbocache.backends import BACKENDS

assert turbocache  # it has put the fast BLAS in front

BACKENDS["cuda"] = with_lanes("cuda", faulty("encode", compile_error))
setattr(mx, "device_info", lambda *_: {"architecture": "sm_90", "device_name": "Pretended GPU"})  # noqa: B010

app = create_app()
