//! The kernel's NBD client by hand: what `underlay attach --via nbd` does, one step at a time.
//!
//! ```text
//! nbd_device attach SOCKET EXPORT [CONNECTIONS [N [DEAD-AFTER-SECONDS]]]   prints N
//! nbd_device keep SOCKET EXPORT N [CONNECTIONS]       reconnects it whenever its connections end
//! nbd_device reconnect SOCKET EXPORT N [CONNECTIONS]
//! nbd_device resize SOCKET EXPORT N                   to the export's size of now
//! nbd_device resize-to BYTES EXPORT N
//! nbd_device detach N [force]
//! nbd_device status
//! ```

use std::{path::Path, process::ExitCode, time::Duration};

use underlay::{
    Error, Kind, Result,
    attach::nbd::{Choice, Client, Links, News, Setup, Watch, device},
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbd_device: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["attach", socket, export, rest @ ..] => {
            let count = rest.first().map_or(Ok(1), |text| number(text))?;
            let choice = rest.get(1).map(|text| number(text).map(Choice::Number));
            let links = Links::dial(Path::new(socket), export, count as usize)?;
            let mut what = Setup::new(*export);
            if let Some(seconds) = rest.get(2) {
                what.dead_after = Duration::from_secs(number(seconds)?.into());
            }
            let choice = choice.transpose()?.unwrap_or(Choice::Any);
            println!("{}", Client::open()?.connect(choice, &what, links)?);
        }
        ["keep", socket, export, index, rest @ ..] => {
            keep(Path::new(socket), export, number(index)?, connections(rest)?)?;
        }
        ["reconnect", socket, export, index, rest @ ..] => {
            reconnect(Path::new(socket), export, number(index)?, connections(rest)?)?;
        }
        ["resize", socket, export, index] => {
            let size = Links::dial(Path::new(socket), export, 1)?.size();
            Client::open()?.resize(number(index)?, &Setup::new(*export), size)?;
        }
        ["resize-to", bytes, export, index] => {
            let size = u64::from(number(bytes)?);
            Client::open()?.resize(number(index)?, &Setup::new(*export), size)?;
        }
        ["detach", index, force @ ..] => {
            let index = number(index)?;
            let users = device::users(Path::new(device::SYSFS), Path::new(device::PROCFS), index)?;
            if let (false, [first, ..]) = (force == ["force"], &users[..]) {
                let what = format!("/dev/nbd{index} is {first}; close it, or detach by force");
                return Err(Error::new(Kind::InUse, what));
            }
            Client::open()?.disconnect(index)?;
        }
        ["status"] => {
            for status in Client::open()?.status()?.iter().filter(|status| status.used) {
                println!("{status:?}");
            }
            for device in device::attached(Path::new(device::SYSFS))? {
                println!("{device:?}");
            }
        }
        _ => return Err(Error::new(Kind::Invalid, "see the head of examples/nbd_device.rs")),
    }
    Ok(())
}

fn reconnect(socket: &Path, export: &str, index: u32, count: usize) -> Result<()> {
    let links = Links::dial(socket, export, count)?;
    Client::open()?.reconnect(index, &Setup::new(export), links)
}

/// Reconnects the device for as long as it is attached.
fn keep(socket: &Path, export: &str, index: u32, count: usize) -> Result<()> {
    let mut watch = Watch::open()?;
    let sysfs = Path::new(device::SYSFS);
    loop {
        let news = watch.news(Duration::from_secs(1))?;
        if device::find(sysfs, index)?.is_none_or(|device| device.backend != export) {
            return Ok(());
        }
        if !news.iter().any(|news| matches!(news, News::Lost) || *news == News::Dead(index)) {
            continue;
        }
        while let Err(error) = reconnect(socket, export, index, count) {
            if error.kind() != Kind::Unavailable {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("nbd_device: /dev/nbd{index} reconnected");
    }
}

fn connections(rest: &[&str]) -> Result<usize> {
    rest.first().map_or(Ok(1), |text| number(text).map(|count| count as usize))
}

fn number(text: &str) -> Result<u32> {
    let wrong = |error| Error::caused(Kind::Invalid, format!("{text:?} is no number"), error);
    text.parse().map_err(wrong)
}
