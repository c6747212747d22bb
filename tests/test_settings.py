"""Settings: what counts over what, and what a wrong one is told."""

import dataclasses

import pytest
import torch

from dkd_trainer.__main__ import read_arguments, read_settings
from dkd_trainer.fields import SettingsError
from dkd_trainer.host import explain_shortage
from dkd_trainer.settings import PRESETS, Settings, assemble_settings, default_tables, list_presets, read_toml


def read(*arguments):
    return read_settings(read_arguments(["--data", "pairs", "--out", "s.safetensors", *arguments]))


def test_a_file_counts_over_its_preset_and_an_option_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "mini"\n[student]\nmemory = 5\nrank = 3\n[train]\nbatch = 4\n')
    settings = read("--config", str(file), "--rank", "2", "--set", "train.batch=6")
    assert (settings.preset, settings.student.levels, settings.data.size) == ("mini", (0,), 128)
    assert (settings.student.memory, settings.student.rank, settings.train.batch) == (5, 2, 6)
    assert settings.student.coarse_share == Settings().student.coarse_share


def test_the_options_of_the_published_commands_are_short_for_settings():
    command = """--teacher t.ckpt --size 128 --levels 0 2 --token-budget 0.25 --coarse-share 0.5 --memory 8
        --rank 4 --router 32 --transfer-steps 7 --imitation-steps 5 --quality-steps 3 --batch 2 --seed 9 --work w
        --device cpu --start s.safetensors --control a.safetensors b.safetensors"""
    settings = read(*command.split())
    student = settings.student
    assert (student.levels, student.token_budget, student.coarse_share) == ((0, 2), 0.25, 0.5)
    assert (student.memory, student.rank, student.router_width) == (8, 4, 32)
    assert (settings.transfer.steps, settings.imitation.steps, settings.quality.steps) == (7, 5, 3)
    assert (settings.train.batch, settings.train.seed, settings.train.device, settings.data.size) == (2, 9, "cpu", 128)
    assert (settings.start, settings.pair.controls) == ("s.safetensors", ("a.safetensors", "b.safetensors"))
    assert (settings.teacher.file, str(settings.work), settings.data.path) == ("t.ckpt", "w", "pairs")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.batch=0", ("'train.batch'", "0", "a whole number from 1")),
        ("train.batch=2.5", ("'train.batch'", "2.5", "a whole number")),
        ("train.precision=fp16", ("'train.precision'", "'fp16'", "'fp32', 'bf16'")),
        ("train.ema=1", ("'train.ema'", "1.0", "to 0.99999")),
        ("transfer.rate=0", ("'transfer.rate'", "0.0", "greater than 0")),
        ("imitation.rate=nan", ("'imitation.rate'", "nan", "a number")),
        ("imitation.balance=1", ("'imitation.balance'", "1", "true or false")),
        ("quality.noise=[1.0]", ("'quality.noise'", "(1.0,)", "two weights")),
        ("quality.noise=1.0", ("'quality.noise'", "1.0", "a list")),
        ("imitation.guidance=[1, 2, 3]", ("'imitation.guidance'", "least and the greatest")),
        ("train.budgets=[]", ("'train.budgets'", "()", "factors of student.token_budget")),
        ("student.token_budget=2", ("[student]", "'token_budget'", "2", "in (0, 1]")),
        ("student.levels=0", ("'student.levels'", "0", "a list")),
        ("data=3", ("'data'", "3", "a table")),
        ("train.bach=3", ("unknown", "'train.bach'", "'train.batch'")),
        ("imitaton.rate=1", ("unknown", "'imitaton'", "'imitation.rate'")),
        ("output.file=s.ckpt", ("'output.file'", "'s.ckpt'", ".safetensors")),
        ("train.batch", ("--set", "'train.batch'", "section.name=value")),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name_what_was_found_and_what_is_allowed(override, parts):
    with pytest.raises(SettingsError) as error:
        read("--set", override)
    missing = [part for part in parts if part not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def test_a_text_needs_no_quotes_in_an_override():
    assert read("--set", "data.held_out=a folder/b").data.held_out == "a folder/b"


def test_what_is_missing_is_named_with_its_option():
    with pytest.raises(SettingsError, match="'data.path' is missing; give --data"):
        read_settings(read_arguments(["--out", "s.safetensors"]))


@pytest.mark.parametrize("text", ["[train\n", "\xff"], ids=["no TOML", "no UTF-8"])
def test_a_file_that_is_no_toml_is_named(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(SettingsError, match="run.toml cannot be read"):
        assemble_settings(config=file)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match="'tiny', expected one of mini, official, sd21"):
        assemble_settings("tiny")


@pytest.mark.parametrize("preset", ["", *list_presets()])
def test_written_settings_read_back_as_they_were(tmp_path, preset):
    strange = 'quotes " and \\ and \x7f and Ärger \N{SNOWMAN} \N{PARTY POPPER}'
    settings = assemble_settings(preset, overrides=[("data.path", strange), ("imitation.guidance", [1, 7.5])])
    file = tmp_path / "run.toml"
    file.write_text(settings.to_toml(), encoding="utf-8")
    assert assemble_settings(config=file) == settings
    assert settings.data.path == strange


@pytest.mark.parametrize("preset", list_presets())
def test_a_preset_holds_only_what_differs_from_the_defaults(preset):
    defaults, tables = default_tables(), read_toml(PRESETS / f"{preset}.toml")
    for section, table in (*tables.pop("steered", {}).items(), *tables.items()):
        same = [name for name, value in table.items() if defaults[section][name] == value]
        assert not same, f"[{section}] {same}"


def test_the_official_preset_has_the_published_control_terms_where_controls_are_given(tmp_path):
    def list_terms(*arguments):
        settings = read("--preset", "official", *arguments)
        return [(part.control, part.control_blocks) for part in (settings.imitation, settings.quality)]

    published, none = (0.63, 0.03), (0.0, 0.0)
    steered = ("--control", "low.safetensors")
    assert list_terms() == [none, none] and list_terms(*steered) == [published, published]
    assert list_terms(*steered, "--set", "imitation.control=0") == [(0.0, 0.03), published]
    assert list_terms(*steered, "--set", "pair.branch=false") == [none, none]
    file = tmp_path / "run.toml"
    file.write_text('preset = "official"\n[pair]\ncontrols = ["low.safetensors"]\n[quality]\ncontrol_blocks = 0.5\n')
    assert list_terms("--config", str(file)) == [published, (0.63, 0.5)]
    assert read("--preset", "mini", *steered).imitation.control == 0


def test_what_decides_the_weights_holds_no_path():
    settings = read("--work", "secret", "--held-out", "secret", "--teacher", "secret")
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, path="secret"))
    assert "secret" not in str(settings.describe_run())


def test_shifted_timesteps_lean_towards_the_noise_and_stay_in_range():
    from dkd_trainer.diffusion import shift_timesteps

    t = torch.arange(1000)
    assert torch.equal(shift_timesteps(t, 1.0), t)
    for shift in (0.2, 3.0, 50.0):
        moved = shift_timesteps(t, shift)
        assert moved.min() >= 0 and moved.max() <= 999 and (moved.diff() >= 0).all()
        assert (moved.float().mean() > 499.5) == (shift > 1)
    median = int(shift_timesteps(torch.tensor([500]), 3.0))
    assert median == 750  # 3 / 2 of one half over 1 + 2 / 2


def test_a_gpu_without_enough_memory_is_answered_with_what_to_make_smaller():
    said = pytest.raises(MemoryError, match=r"^CUDA out of memory\. Use a smaller train\.batch\.$")
    with said, explain_shortage("train.batch."):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
