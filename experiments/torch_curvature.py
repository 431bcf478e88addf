"""The other side of ``bench_spectrum.py --torch``: the same MLP in torch, its GGN by curvlinops.

Runs in an interpreter that has ``torch`` and ``curvlinops-for-pytorch``. Reads the weights and the batch from a file,
then for every line of its input, ``product`` or ``eigenvalues K``, does that and writes seconds and values as JSON.
"""

import json
import sys
import time

import curvlinops
import numpy as np
import scipy.sparse.linalg
import torch


def main():
    data = np.load(sys.argv[1])
    number = sum(name.startswith("kernel") for name in data)
    layers = []
    for i in range(number):
        kernel, bias = data[f"kernel{i}"], data[f"bias{i}"]
        layer = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias))
        layers += [layer, torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers[:-1])
    batch = (torch.from_numpy(data["inputs"]), torch.from_numpy(data["targets"]).long())
    loss = torch.nn.CrossEntropyLoss(reduction="mean")
    params = list(model.parameters())
    operator = curvlinops.GGNLinearOperator(model, loss, params, [batch], check_deterministic=False)
    size = sum(p.numel() for p in model.parameters())
    vector = torch.from_numpy(np.cos(np.arange(size)).astype(np.float32))
    for line in sys.stdin:
        name, *number = line.split()
        begin = time.perf_counter()
        if name == "product":
            found = [float(torch.dot(vector, operator @ vector))]
        else:
            on_host = operator.to_scipy()
            values = scipy.sparse.linalg.eigsh(on_host, k=int(number[0]), tol=1e-3, return_eigenvectors=False)
            found = sorted(map(float, values), reverse=True)
        print(json.dumps({"seconds": time.perf_counter() - begin, "values": found}), flush=True)


if __name__ == "__main__":
    main()
