"What a trained model says: to new inputs, where it is most wrong, in files; with the callbacks that change numbers."
import json, sys
import pytest, torch
from miniai import inference
from miniai.callbacks import DeviceCB, MetricsCB, ProgressCB, RecordCB
from miniai.checkpoint import CheckpointCB, CheckpointError, checkpoints
from miniai.data import Dataset
from miniai.datasets import DataLoaders
from miniai.learner import Learner
from miniai.loader import DataLoader
from miniai.nn import cross_entropy
from miniai.training import AmpCB, EMACB
from test_learner import Two, new_dls, new_learner, new_model, points

def test_a_new_batch_is_seen_as_in_validation(capsys):
    learn = new_learner(DeviceCB('cpu'), MetricsCB(), RecordCB(), ProgressCB(), EMACB(.9), AmpCB('bf16'))
    learn.fit(2)
    capsys.readouterr()
    preds, before = learn.get_preds()[0], dict(vars(learn))
    x = points(50, 1)[:][0]
    got = learn.predict_batch(x)
    torch.testing.assert_close(got.float(), preds.float(), rtol=.05, atol=.05)
    assert got.dtype == torch.bfloat16 and not got.requires_grad and dict(vars(learn)) == before and not capsys.readouterr().out
    torch.testing.assert_close(Learner(learn.model, learn.dls).predict_batch(x), learn.model(x).detach(), rtol=0, atol=0)

def test_inputs_by_name_and_several():
    ds = Dataset(a=points(20, 0)[:][0], b=points(20, 1)[:][0], label=points(20, 0)[:][1])
    dls = DataLoaders(DataLoader(ds, 8), DataLoader(ds, 8))
    learn = Learner(Two(), dls, target='label')
    torch.testing.assert_close(learn.predict_batch(a=ds[:]['a'], b=ds[:]['b']), learn.get_preds()[0])
    torch.testing.assert_close(Learner(Two(), dls, target=2).predict_batch(ds[:]['a'], ds[:]['b']), learn.predict_batch(a=ds[:]['a'], b=ds[:]['b'])*0 + Two()(ds[:]['a'], ds[:]['b']))

def test_the_worst_items_are_those_of_all_losses():
    learn = new_learner()
    learn.fit(1)
    preds, targs, losses = learn.get_preds(with_loss=True)
    worst = learn.top_losses(7)
    assert worst.rows.equal(losses.argsort(descending=True, stable=True)[:7]) and worst.inputs.equal(points(50, 1)[:][0][worst.rows])
    assert worst.targs.equal(targs[worst.rows]) and worst.preds.equal(preds[worst.rows])
    torch.testing.assert_close(worst.losses, losses[worst.rows])
    assert len(learn.top_losses(1000).rows) == 50

def test_results_are_a_table_or_pictures(capsys):
    learn = new_learner()
    learn.show_results(3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ['row', 'said', 'is', 'loss'] and [line.split()[0] for line in lines[1:]] == ['0', '1', '2']
    ims = Dataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    axs = Learner(model, DataLoaders(DataLoader(ims, 5), DataLoader(ims, 5), names='abcd')).show_results(7)
    assert sum(bool(ax.images) for ax in axs.flat) == 7

def test_a_regression_has_a_table_too(capsys):
    xy = [(torch.randn(4, 8), torch.randn(4, 4))]
    Learner(new_model(), DataLoaders(xy, xy), lambda p, t: (p-t).square().mean()).show_results(2)
    assert len(capsys.readouterr().out.splitlines()) == 3

def test_weights_are_saved_and_loaded(tmp_path):
    from safetensors import safe_open
    learn = new_learner(MetricsCB(), RecordCB())
    learn.fit(2)
    learn.save(tmp_path/'m.safetensors')
    other = Learner(new_model(), new_dls()).load(tmp_path/'m.safetensors')
    assert torch.equal(other.get_preds()[0], learn.get_preds()[0])
    with safe_open(tmp_path/'m.safetensors', 'pt') as f: assert json.loads(f.metadata()['row']) == {k: v for k,v in learn.rows[-1].items() if k != 'seconds'}
    assert [o.name for o in tmp_path.iterdir()] == ['m.safetensors']
    torch_model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    assert torch.equal(Learner(torch_model, new_dls()).load(tmp_path/'m.safetensors').get_preds()[0], learn.get_preds()[0])

def test_tied_weights_and_parameters_side_by_side_are_saved(tmp_path):
    from miniai.optim import SGD
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.b.weight = self.a.weight
        def forward(self, x): return self.b(self.a(x))
    learn = Learner(Tied(), new_dls(), opt_func=lambda ps, lr: SGD(ps, lr=lr, fused=True))
    learn.fit(1)
    learn.save(tmp_path/'m')
    assert torch.equal(Learner(Tied(), new_dls()).load(tmp_path/'m').get_preds()[0], learn.get_preds()[0])

def test_a_checkpoint_is_loaded_and_what_is_none_is_told(tmp_path):
    learn = new_learner(CheckpointCB(tmp_path/'r'))
    learn.fit(1)
    assert torch.equal(Learner(new_model(), new_dls()).load(checkpoints(tmp_path/'r')[0]).get_preds()[0], learn.get_preds()[0])
    torch.save(learn.model.state_dict(), tmp_path/'m.pt')
    (tmp_path/'x').write_bytes(b'nothing of the kind')
    for name, said in (('m.pt', 'is a pickle'), ('x', 'cannot be read'), ('nowhere', 'there is no file'), ('.', 'no state.json')):
        with pytest.raises(CheckpointError, match=said): learn.load(tmp_path/name)

def test_export_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, 'find_spec', lambda name: None if name == 'onnxscript' else name)
    with pytest.raises(ImportError, match=r"PyTorch writes ONNX with onnxscript, not installed here: pip install 'miniai-torch\[onnx\]'"): new_learner().export(tmp_path/'m.onnx')

def test_export_runs_elsewhere_with_any_number_of_rows(tmp_path):
    for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)
    import onnxruntime
    learn = new_learner()
    learn.fit(1)
    learn.export(tmp_path/'m.onnx')
    session = onnxruntime.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    for n in (1, 9):
        x = torch.randn(n, 8)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), learn.predict_batch(x), rtol=1e-4, atol=1e-5)

def test_nothing_heavy_is_imported():
    import subprocess
    code = 'import sys, miniai.inference; print([m for m in ("matplotlib", "datasets", "onnx", "safetensors") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_losses_of_items_know_what_counts():
    targ = torch.tensor([1, -100, 2])
    learn, preds = new_learner(), torch.randn(3, 4)
    got = learn.item_losses(preds, targ)
    torch.testing.assert_close(got[[0, 2]], cross_entropy(preds, targ, reduction='none')[[0, 2]])
