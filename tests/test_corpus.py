"""The corpus with the real mini teacher: encoded once, resumed after kills, shared by processes, read by bucket."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dkd_trainer.data.corpus import open_corpus
from dkd_trainer.data.drawing import Drawing
from dkd_trainer.data.encoder import Effort
from dkd_trainer.data.source import DataError

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64
SMALL = Effort(batch=2, rows=2, quiet=True)  # several shards of a few pictures


def write_pair(folder, number, shape=(80, 80), prompt=None, seed=None):
    """A picture of coarse noise, which no two seeds share, with its prompt."""
    rng = np.random.default_rng(number if seed is None else seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    folder.mkdir(exist_ok=True)
    coarse.resize(shape).save(folder / f"{number:03d}.png")
    (folder / f"{number:03d}.txt").write_text(prompt or f"red apple number {number}", encoding="utf-8")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ten good pairs, two of them with the same prompt, and a cut-off picture in the middle."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(11):
        write_pair(folder, number, prompt="octopus" if number in (2, 9) else None)
    broken = folder / "005.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    return folder


def read_all(corpus):
    return {size: corpus.read(members) for size, members in corpus.buckets.items()}


def assert_same(first, second):
    assert first.prompts == second.prompts
    first, second = read_all(first), read_all(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(a, b) for size in first for a, b in zip(first[size], second[size], strict=True))


def open_pairs(folder, teacher, cache, **settings):
    return open_corpus(folder, teacher, cache, SIZE, **{"effort": SMALL, **settings})


@pytest.fixture(scope="module")
def corpus(pairs, teacher, tmp_path_factory):
    return open_pairs(pairs, teacher, tmp_path_factory.mktemp("cache"))


def test_the_corpus_holds_what_the_teacher_makes_of_each_pair(corpus, teacher):
    assert len(corpus) == 10
    assert corpus.buckets == {(8, 8): list(range(10))}
    latents, context = corpus.read([7, 2, 7])
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == context.dtype == torch.float32
    torch.testing.assert_close(latents[:1], teacher.encode_picture(corpus.read_picture(7)[None]), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(context[1:2], teacher.encode_prompts(["octopus"]), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(corpus.empty, teacher.encode_prompts([""]), atol=5e-3, rtol=5e-3)
    assert not torch.equal(latents[0], latents[1])


def test_what_is_read_belongs_to_the_caller(corpus):
    _, context = corpus.read([1])
    expected = context.clone()
    context.zero_()
    assert torch.equal(corpus.read([1])[1], expected)


def test_a_corpus_can_be_sent_to_another_process(corpus):
    corpus.read([0])
    data = pickle.dumps(corpus)
    assert len(data) < 20_000 + corpus.empty.numel() * 4
    assert_same(pickle.loads(data), corpus)


def test_a_broken_picture_is_skipped_and_listed_in_a_file(corpus):
    assert [str(skip).split(":")[0] for skip in corpus.skipped] == ["005.png"]
    assert "1 broken picture" in corpus.describe() and str(corpus.report) in corpus.describe()
    assert "005.png: broken picture" in corpus.report.read_text(encoding="utf-8")


def test_a_second_opening_encodes_nothing(pairs, teacher, corpus):
    again = open_pairs(pairs, teacher, corpus.report.parent)
    assert (corpus.made, again.made) == (11, 0)
    assert_same(again, corpus)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text on this system")
def test_names_that_are_no_utf8_come_from_old_archives_and_are_read(teacher, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9s")
    for number in range(2):
        write_pair(folder, number)
    for suffix in (".png", ".txt"):
        (folder / f"001{suffix}").rename(folder / f"{os.fsdecode(bytes([0xE9]))}{suffix}")
    (folder / "001b.png").write_bytes(b"broken")
    (folder / "001b.txt").write_text("a broken one", encoding="utf-8")
    first, again = (open_pairs(folder, teacher, tmp_path / "cache") for _ in range(2))
    assert (len(first), first.made, len(again), again.made) == (2, 2, 2, 0)


def test_the_first_pairs_alone_are_encoded_where_a_run_says_so(pairs, teacher, tmp_path, make_settings):
    from dkd_trainer.data.batches import open_sources

    settings = make_settings(data__path=str(pairs), data__held_out=str(pairs), data__limit=2, data__size=64)
    corpus, held_out = open_sources(teacher, settings, quiet=True)
    assert len(corpus) == 2 < len(held_out)


def test_batches_of_one_bucket_only(pairs, teacher, tmp_path):
    for number, shape in enumerate([(80, 80), (120, 80), (80, 120), (121, 80)]):
        write_pair(tmp_path / "pairs", number, shape)
    mixed = open_pairs(tmp_path / "pairs", teacher, tmp_path / "cache", step=16, max_ratio=2.0)
    assert mixed.buckets == {(8, 8): [0], (6, 10): [1, 3], (10, 6): [2]}
    assert mixed.read([3, 1])[0].shape == (2, 4, 6, 10)
    assert mixed.read_picture(2).shape == (3, 80, 48)
    with pytest.raises(ValueError, match="2 latent sizes"):
        mixed.read([0, 1])
    squares = open_pairs(tmp_path / "pairs", teacher, tmp_path / "cache")
    assert squares.buckets == {(8, 8): [0, 1, 2, 3]}
    assert squares.made == 3


def test_a_changed_picture_is_encoded_again_and_no_other(pairs, teacher, tmp_path):
    folder = tmp_path / "pairs"
    for number in range(3):
        write_pair(folder, number)
    before = open_pairs(folder, teacher, tmp_path)
    write_pair(folder, 1, seed=77)
    (folder / "002.txt").write_text("another prompt", encoding="utf-8")
    after = open_pairs(folder, teacher, tmp_path)
    assert (before.made, after.made) == (3, 1)
    (old, old_context), (new, new_context) = before.read([0, 1, 2]), after.read([0, 1, 2])
    assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [True, False, True]
    assert [torch.equal(a, b) for a, b in zip(old_context, new_context, strict=True)] == [True, True, False]


def test_a_corpus_is_named_by_its_pictures_prompts_and_order_not_by_its_place(teacher, tmp_path):
    def name(change=lambda folder: None):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        for number in range(3):
            write_pair(folder, number)
        change(folder)
        return open_pairs(folder, teacher, tmp_path / "cache").identity

    plain = name()
    others = [
        name(lambda folder: write_pair(folder, 1, seed=77)),
        name(lambda folder: (folder / "001.txt").write_text("another prompt")),
        name(lambda folder: (folder / "002.png").unlink()),
    ]
    assert name() == plain and plain.startswith("3, ")
    assert len({plain, *others}) == 4


def test_a_picture_that_changes_under_way_is_not_kept_under_its_old_content(teacher, tmp_path, monkeypatch):
    from dkd_trainer.data import encoder

    folder, look_at_all = tmp_path / "pairs", encoder.look_at_all
    for number in range(3):
        write_pair(folder, number)

    def look_and_change(*arguments):
        looks = look_at_all(*arguments)
        write_pair(folder, 1, seed=77)
        return looks

    monkeypatch.setattr(encoder, "look_at_all", look_and_change)
    during = open_pairs(folder, teacher, tmp_path)
    assert [str(skip) for skip in during.skipped] == ["001.png: changed while it was read (start again to encode it)"]
    monkeypatch.undo()
    after = open_pairs(folder, teacher, tmp_path)
    assert (len(during), len(after)) == (2, 3)
    torch.testing.assert_close(
        after.read([1])[0], teacher.encode_picture(after.read_picture(1)[None]), atol=5e-3, rtol=5e-3
    )


def test_copies_of_a_picture_are_encoded_once(teacher, tmp_path):
    for number in range(3):
        write_pair(tmp_path / "pairs", number, seed=1)
    corpus = open_pairs(tmp_path / "pairs", teacher, tmp_path)
    assert (len(corpus), corpus.made) == (3, 1)


def test_small_pictures_are_listed_and_nothing_usable_is_an_error(teacher, tmp_path):
    write_pair(tmp_path / "pairs", 0, (31, 200))
    with pytest.raises(DataError, match=r"none of the 1 pairs.*1 too small.*31x200 pixels, expected 32"):
        open_pairs(tmp_path / "pairs", teacher, tmp_path / "cache")
    assert len(open_pairs(tmp_path / "pairs", teacher, tmp_path / "cache", min_side=31)) == 1


def test_shards_give_what_the_folder_gives(pairs, teacher, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for file in sorted(pairs.iterdir()):
            tar.add(file, file.name)
    cache = tmp_path / "cache"
    assert_same(open_pairs(tmp_path / "0.tar", teacher, cache), open_pairs(pairs, teacher, cache))
    assert open_pairs(tmp_path / "0.tar", teacher, cache).made == 0


def test_prompts_alone_are_drawn_by_the_teacher_from_their_seed(teacher, tmp_path):
    source, drawing = tmp_path / "prompts.txt", Drawing(steps=2, cfg=3.0)
    source.write_text("octopus\nred apple\noctopus\n")
    drawn = open_pairs(source, teacher, tmp_path / "cache", drawing=drawing)
    latents, context = drawn.read([0, 1, 2])
    assert latents.shape == (3, 4, 8, 8) and latents.isfinite().all()
    assert torch.equal(context[0], context[2]) and not torch.equal(latents[0], latents[2])
    source.write_text("red apple\noctopus\n")
    fewer = open_pairs(source, teacher, tmp_path / "cache", drawing=drawing)
    assert fewer.made == 0
    assert torch.equal(fewer.read([0, 1])[0], latents[[1, 0]])
    other = open_pairs(source, teacher, tmp_path / "cache", drawing=Drawing(steps=2, cfg=3.0, seed=1))
    assert other.made == 2 and other.identity != fewer.identity
    assert not torch.equal(other.read([1])[0][0], latents[0])
    assert drawn.pictures == [None] * 3
    with pytest.raises(DataError, match="without a picture"):
        drawn.read_picture(0)


def test_a_drawn_latent_is_what_the_sampler_gives(teacher, tmp_path):
    from dkd_trainer.data.drawing import draw_noise, plan_seeds
    from dkd_trainer.diffusion import sample_euler, to_noise

    source = tmp_path / "prompts.txt"
    source.write_text("octopus\n")
    drawn = open_pairs(source, teacher, tmp_path / "cache", drawing=Drawing(steps=3, cfg=1.0))
    context = drawn.read([0])[1]

    def predict(x, t):
        return to_noise(teacher.predict(x, t, context), x, t, teacher.prediction)

    noise = draw_noise(plan_seeds(["octopus"], 0)[0], 8)[None]
    torch.testing.assert_close(drawn.read([0])[0], sample_euler(predict, noise, 3), atol=5e-3, rtol=5e-3)


def test_another_teacher_shares_nothing_it_should_not(pairs, teacher, corpus, studio, tmp_path):
    from dkd_trainer.host import Teacher

    other = Teacher(studio.checkpoint, torch.device("cpu"))
    prints = ("vae_fingerprint", "text_fingerprint", "unet_fingerprint")
    assert [getattr(other, name) for name in prints] == [getattr(teacher, name) for name in prints]
    for part, name in zip((other.vae.first_stage_model, other.clip.cond_stage_model, other.unet), prints, strict=True):
        with torch.no_grad():
            next(p for p in part.parameters() if p.ndim > 1).add_(0.1)
        del other.__dict__[name]
        assert getattr(other, name) != getattr(teacher, name)
    changed = open_pairs(pairs, other, corpus.report.parent)
    assert changed.made == 11
    assert not torch.equal(changed.read([0])[1], corpus.read([0])[1])


def test_brackets_in_a_caption_are_no_weights_and_long_ones_are_cut(teacher):
    contexts = teacher.encode_prompts(["red apple (1999:1.5)", "red apple 1999", "red apple " * 100])
    assert contexts.shape[:2] == (3, 77)
    assert torch.equal(contexts[:1], teacher.encode_prompts(["red apple (1999:1.5)"]))
    tokens = teacher.clip.tokenize(r"red apple \(1999:1.5\)")
    torch.testing.assert_close(contexts[:1], teacher.clip.encode_from_tokens(tokens).float())


def start_encoding(pairs, cache, teacher_file):
    """The command of its own process, with shards of two rows."""
    options = {"--data": pairs, "--cache": cache, "--size": SIZE, "--batch": 2, "--rows": 2, "--teacher": teacher_file}
    command = [
        sys.executable,
        "-m",
        "dkd_trainer",
        "encode",
        *(str(part) for item in options.items() for part in item),
    ]
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def count_shards(cache, kind):
    return len(list(cache.glob(f"{kind}-*/[!.]*.safetensors")))


@pytest.mark.parametrize("kind", ["prompts", "latents"])
def test_after_a_kill_the_same_command_goes_on_to_the_same_bits(pairs, teacher, corpus, studio, tmp_path, kind):
    with start_encoding(pairs, tmp_path, studio.checkpoint) as process:
        while not count_shards(tmp_path, kind):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.kill()
    there = count_shards(tmp_path, kind)
    assert there < 6, "it was done before it was killed"
    resumed = open_pairs(pairs, teacher, tmp_path)
    assert resumed.made == 11 - (2 * there if kind == "latents" else 0)
    assert_same(resumed, corpus)
    assert not [file for file in tmp_path.rglob(".*") if file.name.endswith(".partial")]


def test_two_processes_share_the_work(pairs, teacher, corpus, studio, tmp_path):
    processes = [start_encoding(pairs, tmp_path, studio.checkpoint) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    made = [int(out.split(" encoded here")[0].split()[-1]) for out, _ in outputs]
    assert sum(made) == 11, outputs
    assert all(out.startswith("10 pairs") for out, _ in outputs)
    assert_same(open_pairs(pairs, teacher, tmp_path), corpus)
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob("*.partial"))


def test_processes_that_start_at_once_read_every_picture_once(pairs, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from dkd_trainer.data import frames, ledger
    from dkd_trainer.data.buckets import Framing
    from dkd_trainer.data.encoder import Encoder
    from dkd_trainer.data.pairs import list_source

    look_at, seen = frames.look_at, []

    def look_slowly(pair):
        seen.append(pair.name)
        time.sleep(0.05)
        return look_at(pair)

    monkeypatch.setattr(frames, "look_at", look_slowly)
    monkeypatch.setattr(ledger, "YOUNG", 0)

    def look(_number):
        with ThreadPoolExecutor(1) as pool:
            return Encoder(None, tmp_path, Framing(SIZE), Drawing(), SMALL).look(list_source(pairs), pool)

    with ThreadPoolExecutor(3) as processes:
        first, *others = processes.map(look, range(3))
    assert len(first) == 11 and all(other == first for other in others)
    assert sorted(seen) == sorted(set(seen)) and len(seen) == 11
    assert not list(tmp_path.glob("*.lock"))


def test_drawing_in_bf16_is_near_and_kept_apart(teacher, tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("octopus\n")
    drawn = [
        open_pairs(source, teacher, tmp_path / "cache", drawing=Drawing(steps=3, cfg=2.0, precision=precision))
        for precision in ("fp32", "bf16")
    ]
    whole, half = (corpus.read([0])[0] for corpus in drawn)
    assert drawn[1].made == 1 and 1e-4 < ((whole - half).norm() / whole.norm()).item() < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_drawn_ahead_is_what_a_training_of_that_precision_looks_for(teacher, tmp_path, precision):
    from dkd_trainer.data.batches import open_pairs as open_for_training
    from dkd_trainer.data.encode import encode, read_arguments
    from dkd_trainer.settings import assemble_settings

    source, cache = tmp_path / "prompts.txt", tmp_path / "cache"
    source.write_text("octopus\n")
    options = {"data": source, "cache": cache, "size": SIZE, "draw-steps": 2, "cfg": 3.0, "precision": precision}
    ahead = encode(read_arguments([f"--{name}={value}" for name, value in options.items()]), teacher)
    values = {"data.size": SIZE, "data.cache": str(cache), "data.draw_steps": 2, "data.draw_guidance": 3.0}
    settings = assemble_settings(overrides={**values, "train.precision": precision}.items())
    found = open_for_training(str(source), teacher, settings, quiet=True)
    assert (ahead.made, found.made) == (1, 0) and ahead.identity == found.identity


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_each_process_of_a_launcher_encodes_on_its_own_gpu(monkeypatch):
    from dkd_trainer.data.encode import choose_device

    last, before = torch.cuda.device_count() - 1, torch.cuda.current_device()
    monkeypatch.setenv("LOCAL_RANK", str(last))
    try:
        assert choose_device() == torch.device("cuda", last) and torch.cuda.current_device() == last
    finally:
        torch.cuda.set_device(before)
