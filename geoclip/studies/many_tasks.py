"""Which encoding of position serves many tasks: k nearest neighbours and ridge regression, and mean ranks.

In the manner of CoordBench, whose constants are not used here. Tasks that share their places
share the neighbours and one decomposition for ridge.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from joblib import delayed
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from geoclip.datasets.geography import Task
from geoclip.studies import probes

ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4)  # penalties of ridge, chosen for each target by leave-one-out


def compare(
    tasks: Mapping[str, Task],
    embeddings: Mapping[str, Callable],
    config: probes.ProbeConfig,
    neighbours: int,
) -> pd.DataFrame:
    """Return the rows of `probes.compare` for both predictors, "neighbours" and "ridge" in the column probe.

    neighbours: how many training places, nearest in the embedding as it is, answer by their mean or vote.
    Ridge standardises the columns; classes are targets of 0 and 1.
    """
    groups: dict[tuple, list[Task]] = {}
    for task in tasks.values():
        side = task.block_deg or config.block_deg
        groups.setdefault((task.latlon.tobytes(), side), []).append(task)
    rows = []
    for (_, side), group in groups.items():
        latlon, outer = group[0].latlon, replace(config, block_deg=side)
        truths = [_targets(task) for task in group]
        jobs = [(how, *job) for how in probes.SPLITS for job in probes.splits(latlon, how, outer)]
        for name, embedding in embeddings.items():
            x = probes.embed(embedding, latlon)
            for task in group:
                probes.check_rows(x, task.target, latlon, task.measure)
            done = probes.in_threads(delayed(_one)(group, truths, x, neighbours, *job) for job in jobs)
            rows += [row | {"embedding": name, "d": x.shape[1]} for part in done for row in part]
    return pd.DataFrame(rows)


def mean_ranks(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `probes.summarize` of the mean rank of each embedding over the tasks, 1 for the best."""
    ranks = rows.groupby(["task", "split", "probe", "seed"])["score"].rank(ascending=False)
    by = ["embedding", "d", "split", "probe", "seed"]
    numbers = rows.assign(score=ranks)[[*by, "score", "reachable", "n_train", "n_test"]]
    return probes.summarize(numbers.groupby(by, sort=False).mean().reset_index(), by[:-1])


def _targets(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """What is predicted, (n, q): a standardised number, or 0 and 1 for q classes; and the truth (n,)."""
    if task.measure == "r2":
        number = (task.target - task.target.mean()) / task.target.std()
        return number[:, None].astype(np.float32), number
    truth = np.unique(task.target, return_inverse=True)[1]
    return np.eye(truth.max() + 1, dtype=np.float32)[truth], truth


def _one(group, truths, x, neighbours: int, split: str, seed: int, train, test) -> list[dict]:
    """The rows of one outer split: both predictors, each task."""
    y = np.concatenate([targets for targets, _ in truths], 1)
    near = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(x[train])
    scaler = StandardScaler().fit(x[train])
    ridge = RidgeCV(ALPHAS, alpha_per_target=True).fit(scaler.transform(x[train]), y[train])
    answers = {"neighbours": y[train][near.kneighbors(x[test], return_distance=False)].mean(1)}
    answers["ridge"] = ridge.predict(scaler.transform(x[test])).reshape(len(test), -1)
    edges = np.cumsum([targets.shape[1] for targets, _ in truths])[:-1]
    rows = []
    for probe, answer in answers.items():
        for task, (_, truth), own in zip(group, truths, np.split(answer, edges, axis=1), strict=True):
            row = {"task": task.name, "measure": task.measure, "split": split, "probe": probe, "seed": seed}
            own = own[:, 0] if task.measure == "r2" else own.argmax(1)
            rows.append(row | probes.scored(own, truth, train, test, task.measure))
    return rows
