package upstream

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"nbd/nixproto"
)

// A cache is known by its nix-cache-info: whoever asks it anything wants that
// first, once (probe), and all others wait for the same answer. That no answer
// came is remembered in its place.
//
//	unknown ── probe ─▶ alive  (KnownFor) ── does not answer ─▶ dead
//	              └───▶ dead   (DeadFor) ─▶ unknown

// A probe is one request for a nix-cache-info under way.
type probe struct {
	done chan struct{} // closed at its end
	info *nixproto.CacheInfo
	err  error
}

// Info returns what the cache says of itself. ErrUnavailable if it does not
// answer, is no cache, or serves another store than /nix/store.
func (k *Cache) Info(ctx context.Context) (*nixproto.CacheInfo, error) {
	key := memoryKey{cache: k.key}
	if m, ok := k.c.memory.get(key); ok {
		return m.cache, m.err
	}
	k.c.mu.Lock()
	p := k.c.probes[k.key]
	if p == nil {
		p = &probe{done: make(chan struct{})}
		k.c.probes[k.key] = p
		// It belongs to all that wait, so it does not end with the first of them;
		// its own limits are short.
		k.c.work.Go(func() { k.probe(p) })
	}
	k.c.mu.Unlock()
	select {
	case <-p.done:
		return p.info, p.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (k *Cache) probe(p *probe) {
	defer func() {
		k.c.mu.Lock()
		delete(k.c.probes, k.key)
		k.c.mu.Unlock()
		close(p.done)
	}()
	text, err := k.document(k.c.ctx, "nix-cache-info")
	if err == nil {
		p.info, err = nixproto.ParseCacheInfo(text)
	}
	if err == nil && p.info.StoreDir != "" && p.info.StoreDir != nixproto.StoreDir {
		err = fmt.Errorf("it is for the store %q", p.info.StoreDir)
	}
	if err != nil {
		p.info, p.err = nil, k.dead(err)
		return
	}
	k.c.memory.put(memoryKey{cache: k.key}, remembered{cache: p.info}, 0, k.c.cfg.KnownFor)
}

// dead remembers that the cache cannot be used now, and returns that as an
// error.
func (k *Cache) dead(cause error) error {
	err := k.fault(fmt.Errorf("%w: %w", ErrUnavailable, cause))
	k.c.memory.put(memoryKey{cache: k.key}, remembered{err: err}, 0, k.c.cfg.DeadFor)
	k.c.cfg.Logger.Warn("cache is left out for a while", "cache", k.String(), "err", cause, "for", k.c.cfg.DeadFor)
	return err
}

// fault names the cache in an error.
func (k *Cache) fault(err error) error { return fmt.Errorf("cache %s: %w", k, err) }

// Priority is the place of the cache among others, the lowest first: what its
// URL says, else what it says of itself.
func (k *Cache) priority(info *nixproto.CacheInfo) int {
	if k.src.priority != nil {
		return *k.src.priority
	}
	return info.Priority
}

// Order returns those of the caches that are available, in the order of their
// priority, and the errors of the others. It asks all of them at once.
func Order(ctx context.Context, caches []*Cache) (ordered []*Cache, faults []error) {
	type answer struct {
		cache    *Cache
		priority int
		err      error
	}
	answers := make([]answer, len(caches))
	done := make(chan struct{})
	for i, k := range caches {
		go func() {
			defer func() { done <- struct{}{} }()
			info, err := k.Info(ctx)
			if answers[i] = (answer{cache: k, err: err}); err == nil {
				answers[i].priority = k.priority(info)
			}
		}()
	}
	for range caches {
		<-done
	}
	slices.SortStableFunc(answers, func(a, b answer) int { return cmp.Compare(a.priority, b.priority) })
	for _, a := range answers {
		if a.err != nil {
			faults = append(faults, a.err)
		} else {
			ordered = append(ordered, a.cache)
		}
	}
	return ordered, faults
}
