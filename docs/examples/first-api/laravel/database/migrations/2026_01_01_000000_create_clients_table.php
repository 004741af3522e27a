<?php

use Illuminate\Database\Migrations\Migration;
use Illuminate\Database\Schema\Blueprint;
use Illuminate\Support\Facades\Schema;

return new class extends Migration
{
    public function up()
    {
        Schema::create('clients', function (Blueprint $table) {
            $table->string('id')->primary();
            $table->unsignedBigInteger('generation');
            $table->string('push_url', 500);
            $table->unsignedBigInteger('sequence');
            $table->text('answer')->nullable();
        });
    }

    public function down()
    {
        Schema::dropIfExists('clients');
    }
};
