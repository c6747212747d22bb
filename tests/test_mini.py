"""The mini SD-2.1's checkpoint: what is written can be taken apart again, and trained on."""

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def parts(studio):
    from dkd_trainer.mini.export import split_checkpoint

    return split_checkpoint(studio.checkpoint)


def test_a_checkpoint_comes_apart_into_the_parts_it_was_made_of(studio, parts):
    from dkd_trainer.mini.export import assemble_checkpoint

    written, again = load_file(studio.checkpoint), assemble_checkpoint(*parts)
    assert set(written) == set(again)
    assert all(torch.equal(written[name], again[name]) for name in written)


@torch.no_grad()
def test_the_narrow_autoencoder_equals_the_stock_one_that_the_host_builds(studio, parts):
    from dkd_trainer.mini.autoencoder import LATENT_SCALE, Autoencoder, decode

    narrow = Autoencoder()
    narrow.load_state_dict(parts[2])
    pictures = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    vae = studio.host.call("CheckpointLoaderSimple", ckpt_name=studio.checkpoint.name)[2]
    latents = vae.encode(pictures).clone()
    found = narrow.taesd_encoder(pictures.permute(0, 3, 1, 2)) / narrow.vae_scale + narrow.vae_shift
    assert (found - latents).norm() / latents.norm() < 0.02
    picture = decode(narrow, latents * LATENT_SCALE).permute(0, 2, 3, 1)
    torch.testing.assert_close(picture, vae.decode(latents).clone(), atol=0.02, rtol=0)


def test_training_goes_on_from_a_checkpoint_alone(studio, tmp_path):
    from dkd_trainer.engine.schedule import load_state
    from dkd_trainer.mini.export import start_from
    from dkd_trainer.mini.teacher import MiniTeacher

    checkpoint, work = tmp_path / "mini.safetensors", tmp_path / "work"
    save_file(load_file(studio.checkpoint), checkpoint, metadata={"training": '{"steps": 7}'})
    work.mkdir()
    with pytest.raises(ValueError, match="trained for 7 steps; give --steps above"):
        start_from(checkpoint, work, 7)
    assert not list(work.iterdir())
    assert start_from(checkpoint, work, 8) == 7
    MiniTeacher().load_state_dict(load_state(work / "teacher.pt")["model"])
    with pytest.raises(FileExistsError, match="leave out --start"):
        start_from(checkpoint, work, 8)
