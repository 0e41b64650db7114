"""Published checkpoints become rules like our own; damaged ones one documented error."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import tensorboardX  # noqa: F401  (imported here: its deprecation warnings are not the command line's)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

import learned_opt
from learned_opt import reference, store
from meta_train import cli, published
from meta_train.commands import shared
from tasks import suites
from tasks.families.synthetic import quadratic

HERE = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "golden"
GOLDEN = {"adafac_mlp": "AdafacMLPLOpt_h4", "velo": "HyperV2_bugged", "mlp": "MLPLOpt", "celo2": "Celo2Base"}


def flax_array(x):
    x = np.asarray(x, order="C")
    return msgpack.ExtType(1, msgpack.packb([list(x.shape), x.dtype.name, x.tobytes()]))


def nested(leaves):
    """The pytree of golden leaves, which are named by their path; keys that hold a slash stay in one piece."""
    tree = {}
    for path, value in leaves.items():
        *parts, last = path.replace("rnn/linear", "rnn|linear").split("/")
        node = tree
        for name in parts:
            node = node.setdefault(name.replace("|", "/"), {})
        node[last] = flax_array(value)
    return tree


def golden_leaves(name):
    with np.load(HERE / f"{GOLDEN[name]}.npz", allow_pickle=False) as file:
        return {key.removeprefix("theta/"): file[key] for key in file.files if key.startswith("theta/")}


def write(path, tree):
    path.write_bytes(msgpack.packb(tree))
    return path


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("rule", GOLDEN)
def test_an_imported_rule_is_the_reference_s(rule, wrapped, capsys):
    leaves = golden_leaves(rule)
    tree = {"params": nested(leaves), "gen_id": "x", "step": 7} if wrapped else nested(leaves)
    assert cli.main(["import", rule.replace("_", "-"), str(write(Path("file"), tree)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rule"] == rule
    theta = learned_opt.load_rule(f"imported/{rule}").theta
    jax.tree.map(np.testing.assert_array_equal, theta, reference.from_reference(rule, leaves)[1])


def test_arguments_that_no_weight_tells_can_be_set():
    file = str(write(Path("file"), nested(golden_leaves("velo"))))
    assert cli.main(["import", "velo", file, "--set", "loss_horizon=null", "--to", "fixed"]) == 0
    assert store.read_record("fixed")["kwargs"]["loss_horizon"] is None
    assert cli.main(["import", "velo", file]) == 0
    assert store.read_record("imported/velo")["kwargs"]["loss_horizon"] == 10


def import_celo(rule):
    file = SHARED / f"{rule}.theta.state"
    if not file.exists():
        pytest.skip("the published weights lie outside the repository")
    assert cli.main(["import", rule, str(file), "--to", "mine"]) == 0


@pytest.mark.parametrize("rule", ["celo", "celo_adam"])
def test_the_published_celo_files(rule, capsys):
    import_celo(rule)
    optimizer = learned_opt.load("mine", num_steps=10, learning_rate=1.0)
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    updates, _ = optimizer.update(params, optimizer.init(params), params, value=jnp.float32(2.0))
    assert all(bool(jnp.all((u < 0) & (u > -0.1))) for u in updates.values())  # downhill of |p|^2, and not far
    capsys.readouterr()
    assert cli.main(["info", "mine"]) == 0
    assert "value and num_steps" in capsys.readouterr().out


def test_an_imported_rule_is_benchmarked(capsys, monkeypatch):
    import_celo("celo_adam")
    entry = suites.Entry("bowl", "quadratic", "quadratic 1-10", lambda: quadratic(dim=3, condition=(1.0, 10.0)))
    monkeypatch.setitem(suites.HELD_OUT, "small", (entry,))
    monkeypatch.setattr(shared, "use_cores", lambda *_: None)
    assert cli.main(["bench", "mine", "--suite", "small", "--steps", "10", "--seeds", "1", "--out", "bench"]) == 0
    assert "mine" in capsys.readouterr().out


def one_line(arguments, capsys, *expected):
    capsys.readouterr()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 400
    for text in expected:
        assert text in error


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (b"", "damaged"),
        (b"\x93\x01", "damaged"),
        (b"no msgpack", "damaged"),
        (msgpack.packb([1, 2]), "no arrays"),
        (b"\xdd\xff\xff\xff\xff", "damaged"),  # a list that claims four billion entries
        (b"\x81\xa1a" * 5000 + b"\x01", "damaged"),  # five thousand nested maps
        (msgpack.packb({"a": flax_array(np.zeros(2, np.complex64))}), "dtype 'complex64'"),
        (msgpack.packb({"a": flax_array(np.array([np.nan], np.float32))}), "not finite"),
        (msgpack.packb({"a": flax_array(np.array([1e300]))}), "not finite"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"")}), "extension type 5"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[2], "float32"]))}), "contents"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[0, 1 << 62], "float32", b""]))}), "impossible shape"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb([[1 << 62], "float32", b"1234"]))}), "fill its shape"),
        (msgpack.packb({"other": flax_array(np.zeros(2, np.float32))}), "'nn/~/w0' is missing"),
    ],
)
def test_a_damaged_file_is_one_line(contents, expected, capsys):
    Path("file").write_bytes(contents)
    one_line(["import", "adafac-mlp", "file"], capsys, "file", expected)
    assert not Path("imported").exists()


def test_mistakes_are_one_line(capsys, monkeypatch):
    leaves = golden_leaves("adafac_mlp")
    file = str(write(Path("file"), nested(leaves)))
    one_line(["import", "adafac-mlp", "nowhere"], capsys, "cannot read nowhere")
    one_line(["import", "adam", file], capsys, "known: adafac_mlp, celo")
    one_line(["import", "adafac-mlp", file, "--set", "hidden_size"], capsys, "KEY=VALUE")
    one_line(["import", "adafac-mlp", file, "--set", "hidden_size=x"], capsys, "no JSON")
    one_line(["import", "adafac-mlp", file, "--set", "hidden=3"], capsys, "'hidden'")
    one_line(["import", "adafac-mlp", file, "--set", "hidden_size=5"], capsys, "would be")
    for taken in ("path", "rule", "folder"):
        one_line(["import", "adafac-mlp", file, "--set", f"{taken}=3"], capsys, f"'{taken}'")
    one_line(["import", "mlp", file], capsys, "is missing")
    write(Path("odd"), nested(leaves | {"nn/~/w1": leaves["nn/~/w1"][:, :3]}))
    one_line(["import", "adafac-mlp", "odd"], capsys, "would be")
    monkeypatch.setattr(published, "_MAX_BYTES", 100)
    one_line(["import", "adafac-mlp", file], capsys, "larger than")
    assert not Path("imported").exists()


def test_leaves_of_another_shape_or_stem():
    leaves = golden_leaves("celo2")
    rule, theta = reference.from_reference("celo2", {f"params/{k}": v for k, v in leaves.items()} | {"x": np.ones(1)})
    assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, rule.init(jax.random.key(0)))
    for wrong in (np.float32(1), np.ones((2, 2), np.float32), np.ones((5, 4, 3), np.float32)):
        for name in leaves:
            with pytest.raises(ValueError, match="these are not the leaves"):
                reference.from_reference("celo2", leaves | {name: wrong})


SOUND = msgpack.packb(nested(golden_leaves("adafac_mlp")))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files_raise_only_the_documented_error(data):
    contents = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(contents)))
        kind = data.draw(st.sampled_from(["cut", "flip", "insert", "remove"]))
        if kind == "cut":
            del contents[at:]
        elif kind == "flip" and at < len(contents):
            contents[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            contents[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            del contents[at : at + data.draw(st.integers(1, 8))]
    path = Path("mutated")
    path.write_bytes(bytes(contents))
    try:
        published.import_rule("adafac_mlp", path, Path("out"))
    except published.PublishedError as error:
        lines = str(error).splitlines()
    else:
        learned_opt.load_rule("out")  # a mutation of a weight or of a name that is not read
        lines = ["sound"]
    assert len(lines) == 1
