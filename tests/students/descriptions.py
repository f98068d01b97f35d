"""Students' files of tests, and what stands for the hub."""

from deepkd_plugin import data
from deepkd_plugin.run import checkpoint


def described(**changes):
    """A student's description; 7 classes, images of 16 pixels."""
    usual = {"architecture": "resnet8", "zoo": "cifar", "dataset": "mine", "num_classes": 7, "size": 16}
    usual |= {"class_names": tuple("abcdefg"), "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize": 16, "version": "0"}
    return data.Description(**(usual | changes))


def saved(path, network, **changes):
    checkpoint.save_weights(network.state_dict(), path, described(**changes).strings())
    return path


class Hub:
    """What HfApi has of what is used; it notes its calls."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", repo_id, private, exist_ok))
        address = type("Address", (str,), {"repo_id": repo_id})
        return address(f"https://hub/{repo_id}")

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload", repo_id, folder_path, allow_patterns))
