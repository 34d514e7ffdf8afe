package store

import (
	"errors"
	"fmt"
	"sync"
)

// ErrBusy: all that is under way for an account takes more memory than it may
// have now. It passes when some of that has ended.
var ErrBusy = errors.New("too much is under way at once")

// holdStep is how much a Hold takes at once. That much it may have without
// being counted, so that the many small ones cost nothing.
const holdStep = 256 << 10

// holds bounds the memory that requests take beyond their connection: the
// indexes of NARs that are being stored, what is known of paths until they are
// committed, long messages. An account may have as much as it leaves to others:
// one can take a half, two a third each, and nobody all.
type holds struct {
	mu   sync.Mutex // guards what follows
	left int64
	held map[AccountID]int64
}

func newHolds(size int64) *holds { return &holds{left: size, held: make(map[AccountID]int64)} }

// take counts n more bytes for an account, or fewer.
func (h *holds) take(a AccountID, n int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n > 0 && h.held[a]+n > h.left-n {
		return fmt.Errorf("%w: %d MiB of memory are taken for requests of this account, and more cannot be had now "+
			"(NARs of very many files, very many paths or very long lists at once); try again when others have ended", ErrBusy, h.held[a]>>20)
	}
	h.left -= n
	if h.held[a] += n; h.held[a] == 0 {
		delete(h.held, a)
	}
	return nil
}

// A Hold is memory that one request of an account takes, counted against
// Config.Memory. It is used by one goroutine.
type Hold struct {
	of      *holds
	account AccountID
	taken   int64
}

// NewHold returns a Hold of nothing. Its owner releases it.
func (s *Store) NewHold(a AccountID) *Hold { return &Hold{of: s.holds, account: a} }

// Set says how much memory is held from now on, in bytes. If that is more than
// the account may have, the error is ErrBusy, fit for a client, and it is held
// as before.
func (h *Hold) Set(n int64) error {
	want := n / holdStep * holdStep
	if want == h.taken {
		return nil
	}
	if err := h.of.take(h.account, want-h.taken); err != nil {
		return err
	}
	h.taken = want
	return nil
}

// Release says that nothing is held any more.
func (h *Hold) Release() { _ = h.Set(0) } // giving back cannot fail
