"""What one changed word costs: small models with LSTM, GRU, sLSTM, mLSTM, xLSTMStack in one place.

    python benchmarks/swap.py --quick             # two tasks, one seed: about a minute
    python benchmarks/swap.py --jobs 16           # all: an hour and a half of one core on JAX
    python benchmarks/swap.py --only adding --layers "LSTM;sLSTM"

Everything but the layer is the same: data, order of batches, units, Adam at two learning rates,
Keras's defaults. All data are generated from seeds. Of every run the validation loss after each
epoch is kept, as the mean over seeds. Where LSTM ends, the mean of its last three epochs, is what
the other layers have to reach at the same learning rate: told are the epochs that takes them, and
where they end. The backend is KERAS_BACKEND; `--jobs` uses that many processes, one core each.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time

import numpy as np
import record

RATES = (1e-3, 1e-2)
GRAMMAR = np.random.default_rng(7)  # what training and validation share


# The data: functions of a generator and a number of sequences.


def weather(rng, n, T=48, features=5):
    """A daily cycle in noisy series: the clean value of the first, six steps ahead."""
    t = np.arange(T + 6)[None, :, None]
    start, level, drift = rng.uniform(0, 24, (n, 1, 1)), *rng.normal(size=(2, n, 1, 1))
    wave = np.sin(2 * np.pi * (t + start) / 24 + 0.7 * np.arange(features))
    clean = 0.7 * level + rng.uniform(0.5, 1.5, (n, 1, 1)) * wave + 0.5 * drift * t / T
    return clean[:, :T] + 0.5 * rng.normal(size=(n, T, features)), clean[:, -1, :1]


def sentiment(rng, n, T=30):
    """Words are good (1 to 8), bad (9 to 16) or neither; 17 turns the next word's sense round."""
    ids = rng.integers(1, 40, (n, T))
    ids[rng.random((n, T)) < 0.15] = 17
    score = (ids <= 8).astype(int) - ((ids > 8) & (ids <= 16))
    score[:, 1:] *= np.where(ids[:, :-1] == 17, -1, 1)
    return ids, (score.sum(1) > 0).astype(int)


WORDS = [[*GRAMMAR.integers(1, 12, GRAMMAR.integers(2, 6)).tolist(), 0] for _ in range(14)]
FOLLOWS = GRAMMAR.integers(0, len(WORDS), (len(WORDS), 3))


def characters(rng, n, T=40):
    """Text of 14 words, each followed by one of three: the next character at every step."""
    texts = []
    for _ in range(n):
        word, text = rng.integers(len(WORDS)), []
        while len(text) < T + 8:
            text += WORDS[word]
            word = FOLLOWS[word, rng.integers(3)]
        begin = rng.integers(6)
        texts.append(text[begin : begin + T + 1])
    texts = np.array(texts)
    return texts[:, :-1], texts[:, 1:]


SCENES = GRAMMAR.normal(size=(5, 2, 1024))


def video(rng, n, T=20):
    """Features of frames that move from one scene to another: which of five films."""
    film = rng.integers(5, size=n)
    share = np.linspace(0, 1, T)[None, :, None]
    first, last = SCENES[film].transpose(1, 0, 2)[:, :, None]
    nuisance = 2.0 * rng.normal(size=(n, 1, 1024))
    frames = first * (1 - share) + last * share + nuisance + 2.0 * rng.normal(size=(n, T, 1024))
    return np.maximum(0.35 * frames, 0), film


def sensors(rng, n, T=64):
    """A noisy wave of one of four frequencies, at any phase."""
    kind = rng.integers(4, size=n)
    wave = np.array([0.05, 0.07, 0.1, 0.14])[kind][:, None] * np.arange(T)
    x = np.sin(2 * np.pi * (wave + rng.random((n, 1)))) + 0.4 * rng.normal(size=(n, T))
    return x[..., None], kind


def majority(rng, n, T=21):
    """Whether more of 21 numbers are +1 than -1."""
    x = rng.choice([-1, 1], (n, T, 1))
    return x, (x.sum((1, 2)) > 0).astype(int)


def brackets(rng, n, T=24):
    """Opening (1), closing (2) and other (3) signs: how deep we are, 0 to 4, at every step."""
    ids, depth = np.zeros((2, n, T), int)
    now = np.zeros(n, int)
    for t in range(T):
        move = rng.choice([1, -1, 0], n, p=[0.4, 0.4, 0.2])
        move = np.where((now + move < 0) | (now + move > 4), 0, move)
        now = depth[:, t] = now + move
        ids[:, t] = np.select([move == 1, move == -1], [1, 2], 3)
    return ids, depth


def echo(rng, n, T=20, delay=3):
    """The symbol of three steps ago, at every step."""
    ids = rng.integers(1, 9, (n, T))
    return ids, np.pad(ids, ((0, 0), (delay, 0)))[:, :T]


def adding(rng, n, T=40):
    """The sum of the two numbers that are marked, one in each half."""
    x = np.stack([rng.random((n, T)), np.zeros((n, T))], -1)
    marked = np.stack([rng.integers(0, T // 2, n), rng.integers(T // 2, T, n)], 1)
    np.put_along_axis(x[..., 1], marked, 1.0, 1)
    return x, np.take_along_axis(x[..., 0], marked, 1).sum(1, keepdims=True)


def running_mean(rng, n, T=30):
    """The mean of all numbers so far, at every step."""
    x = rng.normal(size=(n, 1, 1)) + rng.normal(size=(n, T, 1))
    return x, np.cumsum(x, 1) / np.arange(1, T + 1)[:, None]


def trend(rng, n, T=30):
    """Whether a noisy line rises, from any level."""
    slope, level = rng.normal(size=(2, n, 1))
    x = level + slope * np.linspace(-1, 1, T) + 0.7 * rng.normal(size=(n, T))
    return x[..., None], (slope[:, 0] > 0).astype(int)


def lengths(rng, n, T=30):
    """Padded texts of 6 to 30 words: which of words 1 and 2 came last."""
    ids = rng.integers(1, 20, (n, T))
    last = np.where(ids <= 2, np.arange(T), -1).max(1)
    ids[last < T - 6, -6] = 1 + rng.integers(2, size=(last < T - 6).sum())
    last = np.where(ids <= 2, np.arange(T), -1).max(1)
    label = ids[np.arange(n), last] - 1
    ids[np.arange(T) < rng.integers(0, T - 5, (n, 1))] = 0  # in front, as pad_sequences does
    return ids, label


def parity(rng, n, T=10):
    """Whether an odd number of ones was seen, at every step."""
    ids = rng.integers(1, 3, (n, T))
    return ids, np.cumsum(ids - 1, 1) % 2


def recall(rng, n, T=100):
    """The first of 100 symbols."""
    ids = rng.integers(1, 9, (n, T))
    return ids, ids[:, 0]


def adding_200(rng, n):
    return adding(rng, n, 200)


# The models. `ids`: how many there are, for an Embedding; `classes`: 0 for numbers.
TASKS = {
    weather: {"units": 32},
    sentiment: {"units": 32, "ids": 40, "classes": 2},
    characters: {"units": 64, "ids": 12, "classes": 12},
    video: {"units": 16, "classes": 5, "batch": 8, "size": 384, "layers": 2},
    sensors: {"units": 32, "classes": 4},
    majority: {"units": 16, "classes": 2},
    brackets: {"units": 16, "ids": 4, "classes": 5},
    echo: {"units": 32, "ids": 9, "classes": 9},
    adding: {"units": 32},
    running_mean: {"units": 16},
    trend: {"units": 16, "classes": 2},
    lengths: {"units": 32, "ids": 20, "classes": 2, "mask": True},
}
# Not counted: beyond what 16 epochs teach an LSTM. Told because memory is what they need.
MORE = {
    parity: {"units": 16, "ids": 3, "classes": 2},
    recall: {"units": 32, "ids": 9, "classes": 9},
    adding_200: {"units": 32},
}
TASKS = {task.__name__: {"data": task, **sizes} for task, sizes in {**TASKS, **MORE}.items()}
MORE = [task.__name__ for task in MORE]
QUICK = ["brackets", "running_mean"]


def stack(units, return_sequences):
    """A Dense to the width, then two blocks; of every step or of the last."""
    import keras

    from keras_xlstm.models import xLSTMStack

    def layers(x):
        x = xLSTMStack(units, num_blocks=2, pattern="1:1")(keras.layers.Dense(units)(x))
        return x if return_sequences else x[:, -1]

    return layers


def layers():
    """{name: function of (units, return_sequences) that makes the layer}"""
    import keras

    from keras_xlstm.layers import mLSTM, sLSTM

    def made(Layer, **options):
        return lambda units, every: Layer(units, return_sequences=every, **options)

    return {
        "LSTM": made(keras.layers.LSTM),
        "GRU": made(keras.layers.GRU),
        "sLSTM": made(sLSTM),
        "sLSTM, 4 heads": made(sLSTM, num_heads=4),
        "mLSTM": made(mLSTM),
        "mLSTM, 4 heads": made(mLSTM, num_heads=4),
        "mLSTM, 4 heads, use_bias": made(mLSTM, num_heads=4, use_bias=True),
        "xLSTMStack": stack,
    }


def drawn(task, rng, size):
    x, y = TASKS[task]["data"](rng, size)
    integers = "ids" in TASKS[task]
    classes = TASKS[task].get("classes", 0)
    return x.astype("int32" if integers else "float32"), y.astype("int32" if classes else "float32")


def model_of(task, make, x, y):
    import keras

    sizes = TASKS[task]
    inputs = keras.Input(x.shape[1:], dtype=str(x.dtype))
    h = inputs
    if "ids" in sizes:
        h = keras.layers.Embedding(sizes["ids"], 16, mask_zero=sizes.get("mask", False))(h)
    every = y.ndim == (2 if "classes" in sizes else 3)
    for further in range(sizes.get("layers", 1))[::-1]:
        h = make(sizes["units"], every or further > 0)(h)
    outputs = keras.layers.Dense(sizes.get("classes", 1))(h)
    return keras.Model(inputs, outputs)


def compiled(task, model):
    import keras

    classes = "classes" in TASKS[task]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if classes else "mse"
    model.compile(keras.optimizers.Adam(), loss)
    return model


def train(task, model, start, seed, rate, epochs):
    """Validation losses by epoch, from the weights of `start`, by the program of `model`."""
    import keras

    sizes = TASKS[task]
    rng = np.random.default_rng(1000 + seed)
    data = drawn(task, rng, sizes.get("size", 1536))
    unseen = drawn(task, rng, 512)
    model.set_weights(start.get_weights())
    for variable in model.optimizer.variables:
        variable.assign(np.zeros(variable.shape))
    model.optimizer.learning_rate = rate
    keras.utils.set_random_seed(seed)
    batch = sizes.get("batch", 32)
    history = model.fit(*data, batch, epochs, verbose=0, validation_data=unseen)
    return [round(float(loss), 5) for loss in history.history["val_loss"]]


def job(task, name, make, seeds, rates, epochs, model=None):
    """One layer in one task: a dictionary for each run. One program serves all."""
    import keras

    example = drawn(task, np.random.default_rng(0), 32)
    found = []
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        start = model_of(task, make, *example)
        if model is None:
            model = compiled(task, model_of(task, make, *example))
            model.optimizer.build(model.trainable_variables)
        for rate in rates:
            begin = time.time()
            losses = train(task, model, start, seed, rate, epochs)
            found.append(
                {"task": task, "layer": name, "rate": rate, "seed": seed, "losses": losses,
                 "weights": model.count_params(), "seconds": round(time.time() - begin, 1)}
            )  # fmt: skip
    return found


def work(arguments):
    task, name, *rest = arguments
    return job(task, name, layers()[name], *rest)


def one_core(counter):
    """Each process takes a core of its own: XLA and torch then start no further threads."""
    if hasattr(os, "sched_setaffinity"):
        with counter.get_lock():
            mine, counter.value = counter.value, counter.value + 1
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[mine % len(cores)]})


def pool(jobs):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    return context.Pool(jobs, one_core, (context.Value("i", 0),))


def mean_losses(runs):
    """{(task, layer, rate): losses by epoch, mean over seeds}"""
    groups = {}
    for run in runs:
        groups.setdefault((run["task"], run["layer"], run["rate"]), []).append(run["losses"])
    return {key: np.mean(losses, 0) for key, losses in groups.items()}


def end(losses):
    return losses[-3:].mean()


def epochs_to(losses, target):
    """The first epoch at or below target, counted from 1; None where there is none."""
    reached = np.flatnonzero(losses <= target)
    return int(reached[0]) + 1 if len(reached) else None


def table(runs, tasks, rate):
    """Lines of Markdown: where a layer ends, and its epochs to where LSTM ends; bold where it does
    not get there. Then in how many of the counted tasks it gets there, and no later than LSTM."""
    losses = mean_losses(run for run in runs if run["rate"] == rate)
    found = {layer for _, layer, _ in losses}
    names = [name for name in layers() if name in found]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    there, no_later = (dict.fromkeys(names, 0) for _ in range(2))
    for task in tasks:
        target = end(losses[task, "LSTM", rate])
        theirs = epochs_to(losses[task, "LSTM", rate], target)
        cells, figures = [], {}
        for name in names:
            own = losses[task, name, rate]
            epochs = epochs_to(own, target)
            figures[name] = end(own), epochs
            there[name] += task not in MORE and epochs is not None
            no_later[name] += task not in MORE and epochs is not None and epochs <= theirs
            cells.append(f"{end(own):.2g} ({epochs})" if epochs else f"**{end(own):.2g}**")
        lines.append(f"| {task.replace('_', ' ')} | " + " | ".join(cells) + " |")
        keep(task, rate, figures)
    counted = len([task for task in tasks if task not in MORE])
    for words, held in (("gets there", there), ("no later than LSTM", no_later)):
        lines.append(f"| {words}, of {counted} | " + " | ".join(map(str, held.values())) + " |")
    return lines


def keep(task, rate, figures):
    """What a row of the table says, for `--record`; 0 epochs: not reached."""
    for n, (metric, unit) in enumerate((("loss at the end", ""), ("LSTM's loss", "epochs"))):
        peer, ours = (
            {
                name: cell[n] or 0
                for name, cell in figures.items()
                if (name in ("LSTM", "GRU")) == other
            }
            for other in (True, False)
        )
        case = f"{task.replace('_', ' ')}, Adam({rate:g})"
        record.add(__file__, case, metric, unit, ours, peer)


def saved(paths):
    runs = []
    for path in paths:
        with open(path) as file:
            runs += [json.loads(line) for line in file]
    return runs


def environment():
    from importlib.metadata import version

    import keras

    backend = keras.backend.backend()
    versions = [f"{n} {version(n)}" for n in ("keras", backend.replace("flow", "flow-cpu"))]
    return f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, {', '.join(versions)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two tasks, one seed and rate")
    parser.add_argument("--only", help="tasks, by commas")
    parser.add_argument("--layers", help="layers, by semicolons; LSTM is needed to compare")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", help="a file for the losses of every run, a line of JSON each")
    record.option(parser)
    parser.add_argument("--read", nargs="*", default=[], help="such files, for the table alone")
    args = parser.parse_args()
    tasks = args.only.split(",") if args.only else QUICK if args.quick else list(TASKS)
    names = args.layers.split(";") if args.layers else list(layers())
    seeds, rates = (1, RATES[1:]) if args.quick else (args.seeds, RATES)
    print(environment(), flush=True)
    jobs = [(task, name, seeds, rates, args.epochs) for task in tasks for name in names]
    runs = saved(args.read)
    if not runs:
        with pool(args.jobs) as workers:
            for found in workers.imap_unordered(work, jobs):
                runs += found
                if args.out:
                    with open(args.out, "a") as file:
                        file.writelines(json.dumps(run) + "\n" for run in found)
    for rate in rates:
        print(f"\nAdam({rate:g}):\n\n" + "\n".join(table(runs, tasks, rate)))


if __name__ == "__main__":
    main()
