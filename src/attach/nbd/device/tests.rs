//! Invariants checked, on trees that look like sysfs and procfs: devices are told with their
//! backends; every kind of user is found, for partitions too; what is missing is no error.

use std::os::unix::fs::symlink;

use super::*;

fn put(root: &Path, file: &str, text: &str) {
    let file = root.join(file);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, text).unwrap();
}

fn device(root: &Path, index: u32, backend: Option<&str>, sectors: &str) {
    put(root, &format!("nbd{index}/size"), &format!("{sectors}\n"));
    put(root, &format!("nbd{index}/ro"), "0\n");
    put(root, &format!("nbd{index}/dev"), &format!("43:{}\n", index * 32));
    if let Some(backend) = backend {
        put(root, &format!("nbd{index}/backend"), &format!("{backend}\n"));
    }
}

#[test]
fn devices_with_a_backend_are_listed_in_order() {
    let root = tempfile::tempdir().unwrap();
    let sysfs = root.path();
    device(sysfs, 11, Some("replica/vm1"), "2048");
    device(sysfs, 2, Some("image/debian"), "8");
    put(sysfs, "nbd2/ro", "1\n");
    device(sysfs, 3, None, "0");
    device(sysfs, 4, Some("somebody else's"), "nonsense");
    device(sysfs, 5, Some("x"), &u64::MAX.to_string());
    put(sysfs, "sda/size", "8\n");
    put(sysfs, "nbdx/backend", "no number\n");
    let found = attached(sysfs).unwrap();
    let expected = [
        Device { index: 2, backend: "image/debian".into(), size: 4096, read_only: true },
        Device { index: 11, backend: "replica/vm1".into(), size: 1 << 20, read_only: false },
    ];
    assert_eq!(found, expected);
    assert_eq!(find(sysfs, 3).unwrap(), None);
    assert_eq!(attached(&sysfs.join("none")).unwrap(), []);
}

#[test]
fn queues_are_counted_and_the_timer_is_set() {
    let root = tempfile::tempdir().unwrap();
    let sysfs = root.path();
    put(sysfs, "nbd0/mq/0/cpu_list", "0");
    put(sysfs, "nbd0/mq/1/cpu_list", "1");
    put(sysfs, "nbd0/queue/io_timeout", "30000\n");
    put(sysfs, "nbd0/inflight", "       3        8\n");
    assert_eq!((in_flight(sysfs, 0), in_flight(sysfs, 1)), (Some(11), None));
    put(sysfs, "nbd0/stat", " 5 0 40 1 600 0 8 1 2 9 9 7000 0 1 1 80000 3\n");
    put(sysfs, "nbd1/stat", "5 0 0 0 x\n");
    put(sysfs, "nbd2/stat", "5 0 0 0 6 0 0\n");
    assert_eq!(
        [0, 1, 2, 3].map(|index| completed(sysfs, index)),
        [Some(87605), None, Some(11), None]
    );
    assert_eq!(queues(sysfs, 0), 2);
    assert_eq!(queues(sysfs, 1), 1, "unknown is one");
    set_io_timeout(sysfs, 0, Duration::from_millis(1500)).unwrap();
    assert_eq!(fs::read_to_string(sysfs.join("nbd0/queue/io_timeout")).unwrap(), "1500");
    let error = set_io_timeout(sysfs, 1, Duration::from_secs(1)).unwrap_err().to_string();
    assert!(error.contains("nbd1/queue/io_timeout"), "{error}");
}

#[test]
fn every_kind_of_user_is_found() {
    let root = tempfile::tempdir().unwrap();
    let (sysfs, procfs) = (root.path().join("sys"), root.path().join("proc"));
    device(&sysfs, 1, Some("replica/vm1"), "2048");
    put(&sysfs, "nbd1/nbd1p1/dev", "43:33\n");
    put(&sysfs, "nbd1/nbd1p1/holders/dm-0", "");
    put(&sysfs, "nbd1/holders/md1", "");
    put(&procfs, "swaps", "Filename Type\n/dev/nbd1p2 partition\n/dev/nbd10 partition\n");
    put(&sysfs, "nbd1/nbd1p2/dev", "43:34\n");
    let mounts = "36 1 43:33 / /mnt/with\\040blank rw - ext4 /dev/root rw\n\
                  37 1 0:99 /sub /btrfs rw shared:1 - btrfs /dev/nbd1 rw\n\
                  38 1 43:64 / /other rw - ext4 /dev/nbd2 rw\n\
                  39 1 0:5 / /dev rw - devtmpfs dev rw\n\
                  no line of mountinfo - at all\n\n";
    put(&procfs, "7/mountinfo", mounts);
    put(&procfs, "8/mountinfo", mounts);
    put(&procfs, "8/comm", "qemu\n");
    fs::create_dir_all(procfs.join("8/fd")).unwrap();
    // A character device in /dev, of another number; a link to nowhere.
    symlink("/dev/null", procfs.join("8/fd/0")).unwrap();
    symlink("/dev/none", procfs.join("8/fd/1")).unwrap();
    put(&procfs, "self/mountinfo", mounts);
    let expected = [
        User::Mount("/btrfs".into()),
        User::Mount("/mnt/with blank".into()),
        User::Holder("dm-0".into()),
        User::Holder("md1".into()),
        User::Swap,
    ];
    assert_eq!(users(&sysfs, &procfs, 1).unwrap(), expected);
    assert_eq!(expected[1].to_string(), "mounted at /mnt/with blank");

    device(&sysfs, 9, Some("replica/idle"), "2048");
    assert_eq!(users(&sysfs, &procfs, 9).unwrap(), []);
    let missing = users(&sysfs, &procfs, 12).unwrap_err().to_string();
    assert!(missing.contains("/dev/nbd12"), "{missing}");
}

#[test]
fn open_descriptors_of_the_running_test_are_no_block_device() {
    let root = tempfile::tempdir().unwrap();
    device(root.path(), 1, Some("x"), "8");
    // /dev/null is a character device: 1:3. A disk of that number is another thing.
    put(root.path(), "nbd1/dev", "1:3\n");
    let _open = fs::File::open("/dev/null").unwrap();
    let found = users(root.path(), Path::new(PROCFS), 1).unwrap();
    assert!(!found.iter().any(|user| matches!(user, User::Process { .. })), "{found:?}");
}

#[test]
fn blanks_in_mount_points_are_read() {
    assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
    assert_eq!(unescape("/a\\04"), "/a\\04");
    assert_eq!(unescape("/a\\999\\"), "/a\\999\\");
}
