package guest

import (
	"sync/atomic"
	"time"

	"nbd/vm/link"
)

// A build's use of memory and disk is looked at while it runs: a builder that
// filled its disk has failed, though it went on without what it could not write,
// and is ended. The next look comes before the disk can be full at fillRate.
const (
	mostBetweenLooks  = time.Second
	leastBetweenLooks = 20 * time.Millisecond
	fillRate          = 1 << 30 // bytes in a second
)

// untilNextLook is the time to the next look at a disk with that much free space.
func untilNextLook(free int64) time.Duration {
	d := time.Duration(float64(free) / fillRate * float64(time.Second))
	return min(max(d, leastBetweenLooks), mostBetweenLooks)
}

// A sampler looks at what a build uses until it is stopped. What it found so far
// is in latest, which goes to the host with each Beat: so the host knows it of
// builds that it kills, too.
type sampler struct {
	group  *cgroup
	disk   func() (diskUse, error)
	onFull func() // is called when the disk is seen to be full
	latest *atomic.Pointer[link.Usage]

	quit, done chan struct{}

	// The fields below belong to run's goroutine until done is closed.
	used link.Usage
	full bool // the disk was
	err  error
}

// startSampler makes a sampler look; stop must be called.
func startSampler(group *cgroup, disk func() (diskUse, error), onFull func(), latest *atomic.Pointer[link.Usage]) *sampler {
	s := &sampler{group: group, disk: disk, onFull: onFull, latest: latest, quit: make(chan struct{}), done: make(chan struct{})}
	go s.run()
	return s
}

func (s *sampler) run() {
	defer close(s.done)
	for {
		var free int64
		if free, s.err = s.look(); s.err != nil {
			return
		}
		if s.full {
			s.onFull()
			return
		}
		timer := time.NewTimer(untilNextLook(free))
		select {
		case <-timer.C:
		case <-s.quit:
			timer.Stop()
			return
		}
	}
}

// look takes one sample and returns how many bytes of the disk are free.
func (s *sampler) look() (free int64, err error) {
	u, err := s.group.usage()
	if err != nil {
		return 0, err
	}
	disk, err := s.disk()
	if err != nil {
		return 0, err
	}
	s.full = s.full || disk.full
	s.used.CPUUser, s.used.CPUSystem = u.cpuUser, u.cpuSystem
	s.used.PeakMemory = max(s.used.PeakMemory, u.peakMemory)
	s.used.PeakScratch = max(s.used.PeakScratch, disk.used)
	now := s.used
	s.latest.Store(&now)
	return disk.free, nil
}

// stop takes the last sample and ends the looking.
func (s *sampler) stop() (used link.Usage, full bool, err error) {
	close(s.quit)
	<-s.done
	if s.err == nil {
		_, s.err = s.look()
	}
	return s.used, s.full, s.err
}
