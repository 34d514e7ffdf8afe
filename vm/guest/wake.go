package guest

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// Requests of /dev/random, linux/random.h.
const (
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// wake gives the guest entropy, processors and the time of its own.
func wake(w *link.Wake) error {
	begun := time.Now()
	if err := reseed(w.Entropy); err != nil {
		return fmt.Errorf("reseed: %w", err)
	}
	if err := bringUp(w.CPUs); err != nil {
		return fmt.Errorf("bring up processors: %w", err)
	}
	now := unix.NsecToTimespec(w.Time + int64(time.Since(begun)))
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// reseed makes the kernel's generator forget what it shares with the guests
// that were restored from the same template.
func reseed(entropy []byte) error {
	if len(entropy) < link.MinEntropy {
		return fmt.Errorf("%d bytes of entropy are not enough", len(entropy))
	}
	f, err := os.OpenFile("/dev/random", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info: bits of entropy, bytes that follow, bytes.
	info := make([]byte, 8, 8+len(entropy))
	binary.NativeEndian.PutUint32(info, uint32(8*len(entropy)))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(entropy)))
	info = append(info, entropy...)
	if err := ioctl(f, rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	return ioctl(f, rndReseedCRNG, 0)
}

// ioctl is for requests that x/sys/unix has no function for.
func ioctl(f *os.File, request, arg uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, arg); errno != 0 {
		return errno
	}
	return nil
}
