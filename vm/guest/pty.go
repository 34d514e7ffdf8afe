package guest

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// openPTY returns a pseudoterminal in raw mode: what the builder writes to the
// slave comes out of the master as it is. The slave belongs to uid.
func openPTY(uid int) (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open pseudoterminal: %w", err)
	}
	if slave, err = openSlave(master, uid); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open pseudoterminal: %w", err), master.Close())
	}
	return master, slave, nil
}

func openSlave(master *os.File, uid int) (*os.File, error) {
	rc, err := master.SyscallConn() // not Fd, which would make reads block a thread
	if err != nil {
		return nil, err
	}
	var n int
	err = errors.Join(rc.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err != nil {
			return
		}
		n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
	}), err)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("/dev/pts/%d", n)
	if err := os.Chmod(name, 0o600); err != nil {
		return nil, err
	}
	if err := os.Chown(name, uid, 0); err != nil {
		return nil, err
	}
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	slave := os.NewFile(uintptr(fd), name)
	if err := makeRaw(fd); err != nil {
		return nil, errors.Join(err, slave.Close())
	}
	return slave, nil
}

// makeRaw does what cfmakeraw(3) does.
func makeRaw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag &^= unix.CSIZE | unix.PARENB
	t.Cflag |= unix.CS8
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}
