package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/store"
)

// maxDrvSize bounds the text of a .drv file, in bytes.
const maxDrvSize = nixproto.MaxMessage

// readDrv reads a derivation that the session may use, and checks that its path
// follows from its text. One that is not there is store.ErrNotFound; one that
// is no derivation is a refusal.
func (b *Builds) readDrv(ctx context.Context, s *Session, path nixproto.StorePath) (*nixproto.Derivation, error) {
	if !path.IsDerivation() {
		return nil, refusef("'%s' is not a derivation", path)
	}
	info, err := s.Sight.Info(ctx, path)
	if err != nil {
		return nil, err
	}
	text, err := b.readFile(ctx, info)
	if err != nil {
		return nil, err
	}
	drv, err := nixproto.ParseDerivation(strings.TrimSuffix(path.Name(), nixproto.DerivationSuffix), text)
	if err != nil {
		return nil, refusef("'%s': %v", path, err)
	}
	right, err := nixproto.MakeTextPath(path.Name(), nixproto.SumSHA256(text), drv.References())
	if err != nil || right != path {
		return nil, refusef("'%s' is not the path of the derivation that it holds", path)
	}
	return drv, nil
}

// readFile reads a path that is one small regular file.
func (b *Builds) readFile(ctx context.Context, info *nixproto.PathInfo) ([]byte, error) {
	blob, err := b.store.OpenBlob(ctx, info.NarHash)
	if err != nil {
		return nil, fmt.Errorf("open contents of %s: %v", info.Path, err) // not ErrNotFound: the path is there
	}
	defer blob.Close()
	index, err := blob.Index()
	if err != nil {
		return nil, fmt.Errorf("open contents of %s: %w", info.Path, err)
	}
	if len(index) == 0 || index[0].Kind != nar.Regular {
		return nil, refusef("'%s' is not a regular file", info.Path)
	}
	if index[0].Size > maxDrvSize {
		return nil, refusef("'%s' is larger than %d bytes", info.Path, maxDrvSize)
	}
	text := make([]byte, index[0].Size)
	if _, err := blob.ReadAt(text, index[0].Offset); err != nil {
		return nil, fmt.Errorf("read %s: %w", info.Path, err)
	}
	return text, nil
}

// maxMemo bounds how many derivations' hashes are remembered for an account.
const maxMemo = 100_000

// maxMemos is how many accounts have a memo, those that used theirs last.
const maxMemos = 16

// drvMemos remember hashes modulo of derivations, of each account apart. They
// never become wrong: a derivation's path follows from its text and from the
// paths of its inputs.
type drvMemos struct {
	mu       sync.Mutex // guards what follows
	accounts map[store.AccountID]*drvMemo
	recent   []store.AccountID // those of accounts, the latest last
}

// A drvMemo remembers hashes of derivations of one account.
type drvMemo struct {
	mu     sync.Mutex // held while modulo is used; guards the fields below
	modulo *nixproto.Modulo
	loaded int // how many derivations modulo may remember
	lookup func(nixproto.StorePath) (*nixproto.Derivation, error)
}

// of returns the memo of an account.
func (m *drvMemos) of(a store.AccountID) *drvMemo {
	m.mu.Lock()
	defer m.mu.Unlock()
	memo := m.accounts[a]
	if memo == nil {
		memo = new(drvMemo)
		m.accounts[a] = memo
	}
	m.recent = append(slices.DeleteFunc(m.recent, func(b store.AccountID) bool { return a == b }), a)
	if len(m.recent) > maxMemos {
		delete(m.accounts, m.recent[0])
		m.recent = m.recent[1:]
	}
	return memo
}

// use calls f with what computes hashes of derivations, which it gets from
// lookup.
func (m *drvMemo) use(lookup func(nixproto.StorePath) (*nixproto.Derivation, error), f func(*nixproto.Modulo) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.modulo == nil || m.loaded > maxMemo {
		m.loaded = 0
		m.modulo = nixproto.NewModulo(func(p nixproto.StorePath) (*nixproto.Derivation, error) {
			m.loaded++
			return m.lookup(p)
		})
	}
	m.lookup = lookup
	defer func() { m.lookup = nil }()
	return f(m.modulo)
}

// notThere reports whether err says that a path is not in the view.
func notThere(err error) bool { return errors.Is(err, store.ErrNotFound) }

// isRefusal reports whether err is the client's to hear.
func isRefusal(err error) bool {
	var refused *refusal
	return errors.As(err, &refused)
}
