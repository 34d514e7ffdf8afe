package server

import (
	"testing"
	"time"
)

// What strangers cause is logged so many times a minute, and counted beyond.
func TestDamper(t *testing.T) {
	var d damper
	start := time.Unix(1_000_000, 0)
	passed := 0
	for i := range 3 * dampedLines {
		if ok, _ := d.pass(start.Add(time.Duration(i) * time.Millisecond)); ok {
			passed++
		}
	}
	if passed != dampedLines {
		t.Errorf("%d lines in a second", passed)
	}
	if ok, dropped := d.pass(start.Add(time.Minute)); !ok || dropped != 2*dampedLines {
		t.Errorf("a minute later: %t, %d not logged before", ok, dropped)
	}
	if ok, dropped := d.pass(start.Add(time.Minute)); !ok || dropped != 0 {
		t.Errorf("the next: %t, %d not logged before", ok, dropped)
	}
}
