package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// diskDeadline is how long a disk may take to show after its driver was loaded.
const diskDeadline = 20 * time.Second

// findDisk returns the device file of the disk with that serial.
func findDisk(serial string) (string, error) {
	dev, err := waitFor(diskDeadline, func() (string, bool, error) {
		files, err := filepath.Glob("/sys/block/*/serial")
		if err != nil {
			return "", false, err
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				return "", false, err
			}
			if strings.TrimSpace(string(b)) == serial {
				return filepath.Base(filepath.Dir(file)), true, nil
			}
		}
		return "", false, nil
	})
	if err != nil {
		return "", fmt.Errorf("find disk %s: %w", serial, err)
	}
	return filepath.Join("/dev", dev), nil
}

// flushDisk drops what the kernel remembers of a disk. A guest that was
// restored from a template has another disk than the one it booted with.
func flushDisk(dev string) error {
	f, err := os.Open(dev)
	if err != nil {
		return err
	}
	err = ioctl(f, unix.BLKFLSBUF, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("flush %s: %w", dev, err)
	}
	return nil
}

// mountScratch mounts the scratch disk. It is thrown away with the guest: nothing is
// worth waiting for it, nor the tables and bitmaps of block groups that are never
// used.
func (k *kit) mountScratch() error {
	return mountDisk(k.disks[link.ScratchSerial], scratchDir, "ext4", 0, "nobarrier,noinit_itable,no_prefetch_block_bitmaps")
}

// mountInputs mounts the disk of the inputs, which a clone of a template has not
// booted with.
func (k *kit) mountInputs() error {
	if err := flushDisk(k.disks[link.InputSerial]); err != nil {
		return err
	}
	return mountDisk(k.disks[link.InputSerial], inputDir, "erofs", unix.MS_RDONLY, "")
}

func mountDisk(dev, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(dev, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s from %s: %w", fstype, dev, err)
	}
	return nil
}

// ioErrors tells whether the kernel has complained of a disk or a file system
// since it was opened. It holds a descriptor of the kernel's log.
type ioErrors struct{ fd int }

func watchIOErrors() (*ioErrors, error) {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open kernel log: %w", err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		return nil, errors.Join(fmt.Errorf("open kernel log: %w", err), unix.Close(fd))
	}
	return &ioErrors{fd}, nil
}

// seen reads the log to its end.
func (e *ioErrors) seen() (bool, error) {
	buf := make([]byte, 8192) // a message is read whole or not at all
	found := false
	for {
		n, err := unix.Read(e.fd, buf)
		switch {
		case err == unix.EAGAIN:
			return found, nil
		case err == unix.EPIPE, err == unix.EINTR: // messages were overwritten; a signal
		case err != nil:
			return found, fmt.Errorf("read kernel log: %w", err)
		default:
			found = found || isIOError(string(buf[:n]))
		}
	}
}

// ioMessages are how kernel messages begin and what they say of a disk that could
// not be read or written, or of a damaged file system. Some messages begin with
// 15 bytes of a builder's choice, the name of a process, and others quote it.
var ioMessages = []struct{ begin, say string }{
	{"I/O error, dev vd", ""},
	{"blk_update_request: I/O error, dev vd", ""}, // of older kernels
	{"Buffer I/O error on dev vd", ""},
	{"EXT4-fs error (device vd", ""},
	{"EXT4-fs warning (device vd", "I/O error"},
	{"EXT4-fs (vd", "I/O error"},
	{"erofs: (device vd", "corrupted"},
	{"erofs (device vd", "corrupted"}, // of newer kernels
}

// isIOError reports whether a kernel message is one of those.
func isIOError(msg string) bool {
	_, text, _ := strings.Cut(msg, ";")
	for _, m := range ioMessages {
		if strings.HasPrefix(text, m.begin) && strings.Contains(text, m.say) {
			return true
		}
	}
	return false
}
