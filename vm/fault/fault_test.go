package fault

import (
	"context"
	"testing"
)

func TestPlan(t *testing.T) {
	p, err := Parse("blob-error,qemu-run*2,none,disk-full*")
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []Fault{BlobError, QEMURun, QEMURun, None, DiskFull, DiskFull, DiskFull} {
		if got := p.Next(); got != want {
			t.Errorf("run %d meets %s, want %s", i, got, want)
		}
	}
	if p, err = Parse("qemu-start"); err != nil {
		t.Fatal(err)
	}
	if first, second := p.Next(), p.Next(); first != QEMUStart || second != None {
		t.Errorf("%s, %s", first, second)
	}
	none, err := Parse("")
	if err != nil || none != nil || none.Next() != None {
		t.Errorf("empty list: %v, %v", none, err)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, bad := range []string{",", "fire", "blob-error*0", "blob-error*-1", "blob-error*x", "blob-error*,none", "blob-error*99999999999"} {
		if p, err := Parse(bad); err == nil {
			t.Errorf("%q is %v", bad, p)
		}
	}
}

func TestContext(t *testing.T) {
	ctx := context.Background()
	if With(ctx, None) != ctx || From(ctx) != None {
		t.Error("a healthy run leaves traces")
	}
	if got := From(With(ctx, BlobWrong)); got != BlobWrong {
		t.Errorf("got %s", got)
	}
}
