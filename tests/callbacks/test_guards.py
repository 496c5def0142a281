import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from callbacks import DiskGuard, ExactResume, NaNGuard, guards
from leanlight.contracts import DivergedError, UserError


class Net(pl.LightningModule):
    """Loss, gradient or term turns bad at one batch."""

    def __init__(self, bad_batch, what="loss", value=float("nan"), manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.bad_batch, self.what, self.value = bad_batch, what, value
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        bad = batch_idx == self.bad_batch
        if bad and self.what == "loss":
            loss = loss * self.value
        self.loss = loss.detach()
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        self.optimizers().step()
        return None

    def on_before_optimizer_step(self, optimizer):
        if self.what == "gradient" and self.global_step == self.bad_batch:
            self.net.weight.grad[:] = self.value

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NetWithTerms(Net):
    def loss_terms(self):
        return {"reconstruction": self.loss * 0 if self.what == "float" else self.loss, "weighting": self.weighting()}

    def weighting(self):
        return self.value if self.what == "float" and self.trainer.global_step > self.bad_batch else 1.0


def fit(module, folder, *callbacks, **settings):
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    torch.manual_seed(0)
    trainer.fit(module, DataLoader([torch.ones(3, 2)] * 8, batch_size=None))
    return trainer


def saved(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_loss_stops_the_run_and_names_step_term_and_last_good_checkpoint(tmp_path, value):
    with pytest.raises(DivergedError) as error:
        fit(Net(4, value=value), tmp_path, NaNGuard(), ExactResume(2))
    message = str(error.value)
    assert "'loss'" in message
    assert "step 5" in message
    assert "batch 4" in message
    assert message.endswith(str(tmp_path / "checkpoints" / "last.ckpt"))
    assert saved(tmp_path)["global_step"] == 4
    assert all(weight.isfinite().all() for weight in saved(tmp_path)["state_dict"].values())


@pytest.mark.parametrize(("what", "term"), [("loss", "reconstruction"), ("float", "weighting")])
def test_manual_optimisation_is_guarded_through_its_loss_terms(tmp_path, what, term):
    with pytest.raises(DivergedError, match=f"'{term}' at step 4"):
        fit(NetWithTerms(3, what, manual=True), tmp_path, NaNGuard(), ExactResume(1))


def test_infinite_update_after_a_finite_loss_is_never_saved(tmp_path):
    with pytest.raises(DivergedError, match=r"weight 'net\.weight' at step 4"):
        fit(Net(3, "gradient", float("inf")), tmp_path, NaNGuard(), ExactResume(1))
    assert saved(tmp_path)["global_step"] == 3
    assert all(weight.isfinite().all() for weight in saved(tmp_path)["state_dict"].values())


@pytest.mark.parametrize("every", [3, 1000])
def test_flags_kept_on_a_device_name_the_first_bad_step_and_nothing_bad_is_saved(tmp_path, monkeypatch, every):
    monkeypatch.setattr(guards, "_must_wait_for", lambda value: True)
    module = NetWithTerms(2)
    with pytest.raises(DivergedError, match=r"'reconstruction' at step 3 \(epoch 0, batch 2\)"):
        fit(module, tmp_path, NaNGuard(every), ExactResume(4))
    assert saved(tmp_path)["global_step"] == 0


def test_flags_kept_on_a_device_are_seen_at_the_end_of_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "_must_wait_for", lambda value: True)
    with pytest.raises(DivergedError, match="last good checkpoint: none yet"):
        fit(Net(7), tmp_path, NaNGuard(1000), enable_checkpointing=False)


def test_healthy_run_is_left_alone(tmp_path):
    assert fit(Net(None), tmp_path, NaNGuard(), DiskGuard(), ExactResume(3)).global_step == 16


def test_interval_below_one_is_refused():
    with pytest.raises(UserError, match="check_every_n_steps"):
        NaNGuard(0)


def test_run_folder_that_cannot_be_made_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"can be written, got {tmp_path}/file/run"):
        fit(Net(None), tmp_path / "file" / "run", DiskGuard(), enable_checkpointing=False)


def test_disk_without_space_is_found_before_training(tmp_path):
    with pytest.raises(UserError, match=r"expected \d+ MB free, got \d+ MB at"):
        fit(Net(None), tmp_path, DiskGuard(min_free_mb=1e12), ExactResume(1))
    assert not (tmp_path / "checkpoints").exists()


def test_disk_that_fills_up_stops_the_run_and_keeps_the_old_checkpoint(tmp_path):
    class Fill(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            disk.min_free_mb = 1e12 if batch_idx == 4 else disk.min_free_mb

    disk = DiskGuard(1)
    with pytest.raises(UserError, match="MB free"):
        fit(Net(None), tmp_path, disk, Fill(), ExactResume(2))
    assert saved(tmp_path)["global_step"] == 4
