package store

import "sync"

// pins keep Sweep from removing blobs that somebody is about to name, and keep
// others from counting on blobs that Sweep is removing.
//
//	          pin                    doom
//	free ──────────▶ pinned   free ───────▶ doomed ──▶ free, and the blob gone
//	     ◀────────── (n times)                 spare
//	         unpin
type pins struct {
	mu     sync.Mutex
	pinned map[sum]int
	doomed map[sum]chan struct{} // closed when the blob is gone
}

func newPins() *pins {
	return &pins{pinned: make(map[sum]int), doomed: make(map[sum]chan struct{})}
}

// pin keeps the blob h until unpin, whether it is there yet or not. If it is
// being removed, pin waits for the removal, which takes a system call or two.
func (p *pins) pin(h sum) {
	p.mu.Lock()
	for {
		gone := p.doomed[h]
		if gone == nil {
			break
		}
		p.mu.Unlock()
		<-gone
		p.mu.Lock()
	}
	p.pinned[h]++
	p.mu.Unlock()
}

// unpin takes back one pin.
func (p *pins) unpin(h sum) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pinned[h]--; p.pinned[h] <= 0 {
		delete(p.pinned, h)
	}
}

// doom says that h is about to be removed; it is refused while h is pinned.
func (p *pins) doom(h sum) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pinned[h] > 0 || p.doomed[h] != nil {
		return false
	}
	p.doomed[h] = make(chan struct{})
	return true
}

// spare says that the removal of h is over, done or not.
func (p *pins) spare(h sum) {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.doomed[h])
	delete(p.doomed, h)
}
