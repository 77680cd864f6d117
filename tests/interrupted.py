"""Sends this process SIGINT while a kernel runs, for each long kernel, on one thread.

Prints JSON: seconds of the whole op, and from the signal, which comes after a fifth of them, to
KeyboardInterrupt; null where the op ended first.
"""

import json
import os
import signal
import threading
import time

import torch

from distaya_ext.ops import cholesky, hessian, influence, obs, refit

torch.set_num_threads(1)
n = 2560
eye = torch.eye(n)
R = eye + torch.triu(torch.full((n, n), 1e-4), 1)
wide = torch.zeros(3 * n, n)
keep = torch.ones(n, n, dtype=torch.bool)
P, targets = torch.zeros(256, n, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.int64)
head = torch.zeros(16 * n, n, dtype=torch.bfloat16)
OPS = {
    "cholesky": lambda: cholesky.cholesky(eye.repeat(1, 1), overwrite=True),
    "inverse": lambda: cholesky.inverse(R),
    "solve": lambda: cholesky.solve(eye, R),
    "hessian": lambda: hessian.hessian_(torch.zeros(n, n), wide),
    "cross": lambda: hessian.cross_(torch.zeros(n, n), wide, wide),
    "sweep": lambda: obs.sweep_(eye.clone(), R, nm=(2, 4)),
    "refit": lambda: refit.refitted(eye, keep, eye, iterations=2),
    "divergence": lambda: influence.divergence(P, P[None], head, targets),
}


def once(op):
    whole = 1e9
    for _ in range(2):
        began = time.perf_counter()
        op()
        whole = min(whole, time.perf_counter() - began)
    sent = []

    def send():
        time.sleep(0.2 * whole)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    sender, finished = threading.Thread(target=send), []
    try:
        sender.start()
        finished.append(op())
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        late = time.perf_counter() - sent[0]
        sender.join()
        return {"whole": whole, "late": None if finished else late}


found = {name: once(op) for name, op in OPS.items()}
R = cholesky.cholesky(torch.eye(8), damp=0.0).R  # nothing is broken afterwards
assert torch.equal(R, torch.eye(8))
print(json.dumps(found))
