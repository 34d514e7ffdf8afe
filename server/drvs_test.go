package server

import (
	"testing"

	"nbd/store"
)

// What is remembered for accounts that come no more is forgotten.
func TestDrvMemosForget(t *testing.T) {
	m := drvMemos{accounts: make(map[store.AccountID]*drvMemo)}
	busy := m.of(1)
	for a := store.AccountID(2); a < 10*maxMemos; a++ {
		m.of(a)
		if m.of(1) != busy {
			t.Fatalf("the memo of an account in use was forgotten after %d others", a)
		}
	}
	if len(m.accounts) != maxMemos || len(m.recent) != maxMemos {
		t.Errorf("%d memos, %d in order", len(m.accounts), len(m.recent))
	}
}
