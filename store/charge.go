package store

import (
	"errors"
	"fmt"
	"sync"
)

// ErrBusy: all that is under way for an account takes more memory than it may
// have now. It passes when some of that has ended.
var ErrBusy = errors.New("too much is under way at once")

// chargeStep is how much a Charge takes at once. That much it may have without
// being counted, so that the many small ones cost nothing.
const chargeStep = 256 << 10

// charges bounds the memory that requests take beyond their connection: the
// indexes of NARs that are being stored, what is known of paths until they are
// committed, long messages. An account may have as much as it leaves to others:
// one can take a half, two a third each, and nobody all.
type charges struct {
	mu   sync.Mutex // guards what follows
	left int64
	held map[AccountID]int64
}

func newCharges(size int64) *charges { return &charges{left: size, held: make(map[AccountID]int64)} }

// take counts n more bytes for an account, or fewer.
func (h *charges) take(a AccountID, n int64) error {
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

// A Charge is memory that one request of an account takes, counted against
// Config.Memory. It is used by one goroutine.
type Charge struct {
	of      *charges
	account AccountID
	taken   int64
}

// NewCharge returns a Charge of nothing. Its owner releases it.
func (s *Store) NewCharge(a AccountID) *Charge { return &Charge{of: s.charges, account: a} }

// Set says how much memory is held from now on, in bytes. If that is more than
// the account may have, the error is ErrBusy, fit for a client, and it is held
// as before.
func (h *Charge) Set(n int64) error {
	want := n / chargeStep * chargeStep
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
func (h *Charge) Release() { _ = h.Set(0) } // giving back cannot fail
