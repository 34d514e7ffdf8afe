package store

import (
	"context"
	"maps"
	"slices"
	"sync"

	"nbd/nixproto"
)

// leases count who uses which path.
type leases struct {
	// deleting is held for writing while paths are deleted, from the look at
	// who uses them until they are gone, and for reading while a lease grows:
	// a path that is found valid under a lease stays.
	deleting sync.RWMutex

	mu    sync.Mutex
	count map[viewPath]int
}

// A Lease keeps paths, with their closures, from deletion and collection until
// Release. Its methods are safe for concurrent use.
type Lease struct {
	s       *Store
	leases  *leases
	account AccountID
	sight   *Sight // holds to its choices until Release; nil for none

	mu    sync.Mutex
	paths map[nixproto.StorePath]bool // nil after Release
	full  int                         // number of paths from which on Shrink looks at them
}

// NewLease returns an empty lease on paths of the account's view.
func (s *Store) NewLease(a AccountID) *Lease {
	return &Lease{s: s, leases: &s.leases, account: a, paths: make(map[nixproto.StorePath]bool), full: leaseSlack}
}

// Add puts paths under the lease. They need not be valid: to be sure of a path,
// lease it first and ask whether it is valid then. After Release it does
// nothing.
func (l *Lease) Add(paths ...nixproto.StorePath) {
	l.leases.deleting.RLock()
	defer l.leases.deleting.RUnlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paths == nil {
		return
	}
	l.leases.mu.Lock()
	defer l.leases.mu.Unlock()
	if l.leases.count == nil {
		l.leases.count = make(map[viewPath]int)
	}
	for _, p := range paths {
		if !l.paths[p] {
			l.paths[p] = true
			l.leases.count[viewPath{l.account, p}]++
		}
	}
}

// leaseSlack is how many paths a lease holds before Shrink looks whether they
// are there.
const leaseSlack = 16 << 10

// Shrink drops paths that are not in the view, once the lease has become twice
// as large as the last call left it. It bounds what somebody can make a long
// lease hold who asks for ever more paths that are not there. It is called when
// nobody relies on paths that were added before they are valid.
func (l *Lease) Shrink(ctx context.Context) error {
	paths := l.overfull()
	if len(paths) == 0 {
		return nil
	}
	valid, err := l.s.Valid(ctx, l.account, paths)
	if err != nil {
		return err
	}
	gone := make(map[nixproto.StorePath]bool, len(paths)-len(valid))
	for _, p := range paths {
		gone[p] = true
	}
	for _, p := range valid {
		delete(gone, p)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paths == nil {
		return nil
	}
	l.dropLocked(gone)
	l.full = max(leaseSlack, 2*len(l.paths))
	return nil
}

// overfull returns the paths of a lease that Shrink is to look at.
func (l *Lease) overfull() []nixproto.StorePath {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.paths) < l.full {
		return nil
	}
	return slices.Collect(maps.Keys(l.paths))
}

// dropLocked takes paths out of the lease.
func (l *Lease) dropLocked(paths map[nixproto.StorePath]bool) {
	l.leases.mu.Lock()
	defer l.leases.mu.Unlock()
	for p := range paths {
		if !l.paths[p] {
			continue
		}
		delete(l.paths, p)
		k := viewPath{l.account, p}
		if l.leases.count[k]--; l.leases.count[k] <= 0 {
			delete(l.leases.count, k)
		}
	}
}

// Release ends the lease.
func (l *Lease) Release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paths == nil {
		return
	}
	l.dropLocked(l.paths)
	l.paths = nil
	if l.sight != nil {
		l.sight.release()
	}
}

// leased reports whether somebody uses a path.
func (l *leases) leased(a AccountID, p nixproto.StorePath) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count[viewPath{a, p}] > 0
}

// of returns the paths of a view that are leased.
func (l *leases) of(a AccountID) []nixproto.StorePath {
	l.mu.Lock()
	defer l.mu.Unlock()
	var paths []nixproto.StorePath
	for k := range l.count {
		if k.account == a {
			paths = append(paths, k.path)
		}
	}
	return paths
}
