package guest

import (
	"errors"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// pumpSize is how much of the log waits for the host at most. When it is full
// the builder waits, as it does when nobody reads its terminal.
const pumpSize = 256 << 10

// pump copies from the terminal's master to w until no process holds the
// terminal any more, and returns how many bytes it wrote. What arrives while a
// write is under way is collected into the next one: each costs a trip to the
// host. A failing w does not stop it from reading, so that the builder ends.
func pump(w io.Writer, master io.Reader) (written int64, err error) {
	var (
		mu      sync.Mutex // guards what follows
		changed = sync.NewCond(&mu)
		pending []byte
		ended   bool
		failed  error
	)
	done := make(chan struct{})
	go func() {
		defer close(done)
		var spare []byte
		mu.Lock()
		defer mu.Unlock()
		for {
			for len(pending) == 0 && !ended {
				changed.Wait()
			}
			if len(pending) == 0 {
				return
			}
			out := pending
			pending = spare[:0]
			changed.Broadcast()
			if failed == nil {
				mu.Unlock()
				n, err := w.Write(out)
				mu.Lock()
				written += int64(n)
				failed = err
			}
			spare = out
		}
	}()
	buf := make([]byte, 32<<10)
	for {
		n, readErr := master.Read(buf)
		mu.Lock()
		for len(pending)+n > pumpSize && len(pending) > 0 {
			changed.Wait()
		}
		pending = append(pending, buf[:n]...)
		ended = readErr != nil
		changed.Broadcast()
		mu.Unlock()
		if readErr != nil {
			<-done
			// A terminal whose last holder is gone says EIO.
			if errors.Is(readErr, unix.EIO) || errors.Is(readErr, io.EOF) {
				readErr = nil
			}
			return written, errors.Join(readErr, failed)
		}
	}
}
