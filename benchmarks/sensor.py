"""What the local model, read as a sensor, adds to the router.

    python -m benchmarks.sensor DATA --model NAME --rows 3000 --by prompt -o FILE

One prefill of each prompt gives its perplexity, the entropy of the first token, further named readings and
the hidden states (``galley.evals.sensor``). A subset of the prompts, the first by ascending hash, is read;
every policy is trained and scored on those rows alone, in the folds of ``galley route eval``, so all see the
same. The settings are those of the router (``evals.train``) or are chosen within the training rows; nothing
looks at the rows scored. Readings are kept in ``FILE.npz`` and taken up again.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from galley import config
from galley.evals.curve import Curve, measure
from galley.evals.outcomes import Outcomes
from galley.evals.sensor import NAMES, Sensor
from galley.evals.study import constants, folds, ranked, scores_of
from galley.evals.train import LEAF, TREES, target, train
from galley.model.model import Model
from galley.model.store import Store
from galley.runtime.backend.native import NativeBackend

Floats = npt.NDArray[np.float64]
AT_ONCE = 64
"""Prompts between two savings of the readings."""


def readings(outcomes: Outcomes, rows: "npt.NDArray[np.intp]", name: str, kept: Path) -> Floats:
    """float64 [len(rows), Sensor.width], read now or taken from ``kept``."""
    known: dict[int, Any] = {}
    if kept.exists():
        table = np.load(kept)
        known = dict(zip(table["rows"].tolist(), table["x"], strict=True))
    missing = [int(row) for row in rows if int(row) not in known]
    if missing:
        entry = Store(config.load({}).home).resolve(name)
        model = Model.open(entry.path, entry.name)
        sensor = Sensor(model, NativeBackend(model.gguf, model.spec, num_blocks=64, threads=None))
        for at in range(0, len(missing), AT_ONCE):
            part = missing[at : at + AT_ONCE]
            known |= dict(zip(part, sensor.read([outcomes.prompts[row] for row in part]), strict=True))
            beside = kept.with_suffix(".tmp.npz")
            np.savez(beside, rows=np.array(list(known)), x=np.stack(list(known.values())))
            os.replace(beside, kept)
            print(f"{len(known)} read", flush=True)
        model.close()
    return np.stack([known[int(row)] for row in rows]).astype(np.float64)


def sensed(x: Floats, gain: Floats, unseen: Floats, hidden: int, seed: int) -> dict[str, Floats]:
    """Scores of the rows not seen, by what they are made from."""
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    count = len(NAMES)
    found: dict[str, Floats] = {}
    for word, name in (("perplexity alone", "nll_mean"), ("first-token entropy alone", "entropy_first")):
        at = NAMES.index(name)
        sign = np.sign(np.corrcoef(x[:, at], gain)[0, 1])
        found[word] = sign * unseen[:, at]
    trees = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, random_state=seed, n_jobs=1)
    found["named readings"] = trees.fit(x[:, :count], gain).predict(unseen[:, :count])
    for word, start in (("mean hidden state", count), ("last hidden state", count + hidden)):
        scaler = StandardScaler().fit(x[:, start : start + hidden])
        ridge = RidgeCV(alphas=[10.0**power for power in range(2, 7)])
        ridge.fit(scaler.transform(x[:, start : start + hidden]), gain)
        found[word] = ridge.predict(scaler.transform(unseen[:, start : start + hidden]))
    return found


def study(outcomes: Outcomes, x: Floats, by: Any, *, seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """Every policy's figures, and what each sensor adds to the router: the difference of APGR over the same
    resamples of the rows, with a 95 % interval."""
    place = folds(outcomes, by, 5)
    gain = target(outcomes)[1][:, 0]
    hidden = (x.shape[1] - len(NAMES)) // 2
    pooled: dict[str, Floats] = {}

    def put(name: str, test: "npt.NDArray[np.intp]", scores: Floats) -> None:
        pooled.setdefault(name, np.zeros(len(outcomes)))[test] = ranked(scores[:, None])[:, 0]

    for fold in range(5):
        rows, test = np.flatnonzero(place != fold), np.flatnonzero(place == fold)
        router = scores_of(train(outcomes.take(rows), seed=seed, lean=True), outcomes.take(test))[:, 0]
        put("galley", test, router)
        for name, scores in sensed(x[rows], gain[rows], x[test], hidden, seed).items():
            put(name, test, scores)
            if "alone" not in name:
                # The router is the mean of two views; a sensor is a third of the same weight.
                views = [2 * (router - router.mean()) / router.std(), (scores - scores.mean()) / scores.std()]
                put(f"galley + {name}", test, sum(views) / 3)
        print(f"{outcomes.name} by {by}: fold {fold + 1} of 5", flush=True)
    best = outcomes.models[int(outcomes.quality.mean(axis=0).argmax())]
    curves = {name: Curve.of_gain(scores) for name, scores in pooled.items()} | constants(outcomes, best)
    figures = measure(outcomes, curves, resamples=resamples, seed=seed)
    added = {
        name: difference(outcomes, curves["galley"], curve, resamples=min(400, resamples), seed=seed)
        for name, curve in curves.items()
        if name.startswith("galley +")
    }
    return {"policies": msgspec.to_builtins(figures), "apgr_added": added}


def difference(outcomes: Outcomes, a: Curve, b: Curve, *, resamples: int, seed: int) -> dict[str, float]:
    """APGR of b less that of a, with a 95 % bootstrap interval over common resamples of the rows."""
    rng = np.random.default_rng(seed)
    every = np.arange(len(outcomes))

    def one(rows: "npt.NDArray[np.intp]") -> float:
        part = outcomes.take(rows)
        found = measure(
            part, {"a": Curve(a.choice[:, rows]), "b": Curve(b.choice[:, rows])}, resamples=0, seed=0
        )
        return found["b"]["apgr"].value - found["a"]["apgr"].value

    values = [one(rng.integers(0, len(every), len(every))) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return {"value": one(every), "low": float(low), "high": float(high)}


def main() -> None:
    """Command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=3000, help="most prompts that are read")
    parser.add_argument("--by", choices=["prompt", "subject"], default="prompt")
    parser.add_argument("--output", "-o", type=Path, required=True)
    given = parser.parse_args()
    whole = Outcomes.read(given.data)
    rows = np.argsort(np.array(whole.keys), kind="stable")[: given.rows]
    x = readings(whole, rows, given.model, given.output.with_suffix(".npz"))
    told = {"dataset": whole.name, "model": given.model, "rows": len(rows), "of": len(whole), "by": given.by}
    told |= study(whole.take(rows), x, given.by)
    given.output.write_text(json.dumps(told, indent=1) + "\n")
    for name, figures in told["policies"].items():
        apgr = figures["apgr"]
        print(f"{name:<32} {apgr['value']:.3f} [{apgr['low']:.3f}, {apgr['high']:.3f}]")
    for name, figure in told["apgr_added"].items():
        print(f"{name:<32} {figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]")


if __name__ == "__main__":
    main()
