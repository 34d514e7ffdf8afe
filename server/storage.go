package server

import (
	"context"
	"sync"
	"time"

	"nbd/nixproto"
	"nbd/store"
)

// A storageMeter knows how much accounts have in the store, for max-storage. It
// counts anew when what it knows is old, or before somebody is refused by it.
type storageMeter struct {
	sizes viewSizes

	mu   sync.Mutex // guards what follows
	seen map[store.AccountID]*storageSeen
}

// viewSizes tells the bytes of an account's view; *store.Store.
type viewSizes interface {
	ViewSize(ctx context.Context, a store.AccountID) (int64, error)
}

// storageSeen is what was counted, and what has come since.
type storageSeen struct {
	at    time.Time
	bytes int64
}

const (
	// meterTrusts is how long a count is good for who is below his limit, and
	// meterAgain, for who is not.
	meterTrusts = time.Minute
	meterAgain  = time.Second
)

// add counts n bytes more for an account, and reports whether these are within
// most.
func (m *storageMeter) add(ctx context.Context, a store.AccountID, n, most int64) (ok bool, err error) {
	if ok, known := m.try(a, n, most, meterTrusts); ok && known {
		return true, nil
	}
	if ok, known := m.try(a, n, most, meterAgain); known {
		return ok, nil
	}
	now := time.Now()
	size, err := m.sizes.ViewSize(ctx, a)
	if err != nil {
		return false, err
	}
	m.mu.Lock()
	if m.seen == nil {
		m.seen = map[store.AccountID]*storageSeen{}
	}
	m.seen[a] = &storageSeen{now, size}
	m.mu.Unlock()
	ok, _ = m.try(a, n, most, meterTrusts)
	return ok, nil
}

// try counts n bytes more by what is known, if that is not older than age.
func (m *storageMeter) try(a store.AccountID, n, most int64, age time.Duration) (ok, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.seen[a]
	if s == nil || time.Since(s.at) > age {
		return false, false
	}
	if s.bytes >= most || n > most-s.bytes {
		return false, true
	}
	s.bytes += n
	return true, true
}

// checkStorage refuses what would bring the account past its max-storage: n
// bytes more, or, if it is there already, anything at all. The bytes count if it
// does not.
func (s *Session) checkStorage(ctx context.Context, n uint64) error {
	if s.book == nil || s.storage == nil {
		return nil
	}
	e := s.book.account(s.account())
	if e.MaxStorage <= 0 {
		return nil
	}
	ok, err := s.storage.add(ctx, s.account(), int64(min(n, 1<<62)), e.MaxStorage)
	if err == nil && !ok {
		err = refusef("account %s has as much in the store as its max-storage of %d bytes allows: delete some of it (nix store delete --store …)",
			s.Client.Account.Name, e.MaxStorage)
	}
	return err
}

// checkUpload looks at each path that the client has brought, before it becomes
// valid.
func (ss *session) checkUpload(info *nixproto.PathInfo) error {
	if err := ss.checkStorage(ss.ctx, info.NarSize); err != nil {
		return err
	}
	return ss.checkSignatures(info)
}
