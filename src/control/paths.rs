//! Where the service keeps its things: by the FHS as root, by the XDG directories otherwise.

use std::{ffi::OsString, path::PathBuf};

use nix::unistd::Uid;

use crate::error::{Error, Kind, Result};

/// Where the service runs when nobody says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// The state directory: which disks the node knows.
    pub state: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// The NBD socket.
    pub nbd_socket: PathBuf,
    /// The configuration file, read when it is there.
    pub config: PathBuf,
}

impl Paths {
    /// The paths of a service that root runs.
    pub fn system() -> Paths {
        Paths {
            state: "/var/lib/underlay".into(),
            socket: "/run/underlay/underlay.sock".into(),
            nbd_socket: "/run/underlay/nbd.sock".into(),
            config: "/etc/underlay/underlay.toml".into(),
        }
    }

    /// The paths of the user who runs this process.
    pub fn of_this_user() -> Result<Paths> {
        if Uid::effective().is_root() {
            return Ok(Paths::system());
        }
        Paths::of_user(|name| std::env::var_os(name))
    }

    /// The paths of an ordinary user whose environment `var` looks up.
    fn of_user(var: impl Fn(&str) -> Option<OsString>) -> Result<Paths> {
        // The XDG specification has relative paths ignored.
        let directory = |name: &str| var(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = directory("HOME");
        let below_home = |name: &str, below: &str| {
            directory(name).or_else(|| home.as_ref().map(|home| home.join(below))).ok_or_else(|| {
                Error::new(
                    Kind::Invalid,
                    format!(
                        "neither {name} nor HOME is set: set one of them, or name the paths with \
                         --config, --state, --socket and --nbd-socket"
                    ),
                )
            })
        };
        let state = below_home("XDG_STATE_HOME", ".local/state")?.join("underlay");
        // Without a runtime directory sockets live in the state directory, which is the user's
        // own: a name in /tmp could be taken by somebody else.
        let runtime = match directory("XDG_RUNTIME_DIR") {
            Some(runtime) => runtime.join("underlay"),
            None => state.join("run"),
        };
        Ok(Paths {
            socket: runtime.join("underlay.sock"),
            nbd_socket: runtime.join("nbd.sock"),
            config: below_home("XDG_CONFIG_HOME", ".config")?.join("underlay/underlay.toml"),
            state,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_their_own_directories() {
        let paths = Paths::of_user(|name| match name {
            "HOME" => Some("/home/ada".into()),
            "XDG_RUNTIME_DIR" => Some("/run/user/1000".into()),
            "XDG_CONFIG_HOME" => Some("relative/is/ignored".into()),
            _ => None,
        })
        .unwrap();
        assert_eq!(paths.state, PathBuf::from("/home/ada/.local/state/underlay"));
        assert_eq!(paths.socket, PathBuf::from("/run/user/1000/underlay/underlay.sock"));
        assert_eq!(paths.config, PathBuf::from("/home/ada/.config/underlay/underlay.toml"));

        let paths = Paths::of_user(|name| (name == "HOME").then(|| "/home/ada".into())).unwrap();
        assert_eq!(paths.nbd_socket, PathBuf::from("/home/ada/.local/state/underlay/run/nbd.sock"));

        let error = Paths::of_user(|_| None).unwrap_err();
        assert!(error.to_string().contains("--state"), "{error}");
    }
}
