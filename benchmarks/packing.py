import numpy as np


def llava_665k(count, seed):
    r = np.random.default_rng(seed)
    for _ in range(count):
        img = r.random() < 0.94
        t = int(np.clip(r.lognormal(5.2, 0.8), 20, 1400)) if img else int(np.clip(r.lognormal(6.5, 0.7), 50, 2000))
        yield t, max(1, int(t * r.uniform(0.05, 0.6))), int(img)
